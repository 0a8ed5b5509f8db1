"""Models that others wrote: a pass that finds the places fastseg's operators serve, and puts them there."""

from __future__ import annotations

from typing import Any

from fastseg.fusion import backend, tracing
from fastseg.fusion.report import Leftover, Place, Replacement, Report
from fastseg.fusion.tracing import fuse, unfuse

__all__ = ["Leftover", "Place", "Replacement", "Report", "fuse", "report", "unfuse"]


def report(model: Any) -> Report:
    """What the pass did to a model: what it replaced and where, what it left and why, and the memory that this saves.

    Args:
        model: What ``torch.compile(..., backend="fastseg")`` gave, a model or a function, after its first call (each
            call may add graphs); or what `fuse` gave.

    Returns:
        The report of all graphs so far; ``print`` it, or read its attributes.

    Raises:
        TypeError: The model has been through neither.
    """
    found = tracing.report_of(model) or backend.report_of(model)
    if found is None:
        raise TypeError(
            f'model: expected what torch.compile(..., backend="fastseg") or fastseg.fuse gave, got {type(model)}'
        )
    return found
