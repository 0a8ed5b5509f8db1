"""Fresh memory that shows where it is read before it was written."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def fresh_memory_of_nan() -> Iterator[None]:
    """Fills every torch.empty with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
