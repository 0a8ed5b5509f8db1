"""Other libraries' losses on fastseg's operators: their constructors, values and gradients."""

from fastseg.losses import monai, smp

__all__ = ["monai", "smp"]
