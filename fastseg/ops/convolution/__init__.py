"""What the convolutions share: geometry, the choice of an algorithm, results and gradients, ReLU and pooling."""
