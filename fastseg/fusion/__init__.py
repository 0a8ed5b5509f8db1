"""Third-party models: a pass that finds the places fastseg's operators serve, and puts them there."""

from fastseg.fusion.record import recording, report
from fastseg.fusion.report import Graph, Leftover, Place, Replacement, Report

__all__ = ["Graph", "Leftover", "Place", "Replacement", "Report", "recording", "report"]
