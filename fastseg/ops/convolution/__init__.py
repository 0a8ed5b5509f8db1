"""What the convolutions share: their geometry, the choice of an algorithm, and gradients."""
