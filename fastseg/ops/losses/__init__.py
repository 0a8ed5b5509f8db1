"""What the pixel losses share: their options, the dtype of their arithmetic, and the losses in plain PyTorch."""
