"""The chart of a report: how many times faster fastseg is than its best peer, a group for each operator."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.harness.suite import BOTH, FASTSEG, FORWARD
from benchmarks.reports import stored
from benchmarks.reports.formatting import significant

COLOURS = {FORWARD: "#7eb0d5", BOTH: "#1f5a91"}
SLOWER = {FORWARD: "#f4a582", BOTH: "#b2182b"}

# In inches, of a picture that a phone shows in its whole width: letters of 11 points can be read there.
WIDTH, HEAD, BAR, BETWEEN_CASES, BETWEEN_OPERATORS = 7.5, 1.1, 0.25, 0.14, 0.55
POINTS = 11
NAMES = 0.36  # of the width is for the cases' names
LEAST_LIMIT = 0.5
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256)
DOTS = 120  # an inch
HEADING = (
    "How many times faster fastseg is than the fastest other",
    f"light: {FORWARD} (of models: prediction); dark: {BOTH} (training step)",
    "red: fastseg is slower; each in its faster memory format",
)
ROOM = 2.7  # octaves right of the longest bar, for its numbers


class Bar(NamedTuple):
    """A bar: how far down it lies, how long it is, and what it says."""

    y: float
    factor: float
    ms: float
    timing: str


def draw(report: Path, path: Path) -> None:
    """Draw the chart of a written report."""
    bars, labels, titles = arrange(stored.read(report))
    length = max((bar.y for bar in bars), default=0.0) + BAR
    height = HEAD + length
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS)
    axes = figure.add_axes((NAMES, 0, 1 - NAMES, length / height))
    axes.set_ylim(length, 0)
    for bar in bars:
        colour = (COLOURS if bar.factor >= 1 else SLOWER)[bar.timing]
        axes.barh(bar.y, math.log2(bar.factor), BAR, color=colour)
        text = f"{bar.factor:.{2 if bar.factor < 10 else 1}f}x  {significant(bar.ms)} ms"
        axes.text(max(math.log2(bar.factor), 0) + 0.08, bar.y, text, va="center", fontsize=POINTS)
    names = axes.get_yaxis_transform()  # across in widths of the axes, down as the bars
    for y, label in labels.items():
        axes.text(-0.02, y, label, transform=names, ha="right", va="center", fontsize=POINTS)
    for y, title in titles.items():
        axes.text(
            -NAMES / (1 - NAMES) + 0.03, y, title, transform=names, va="center", weight="bold", fontsize=POINTS + 2
        )
    factors = [bar.factor for bar in bars] or [1.0]
    least, most = min(*factors, LEAST_LIMIT), max(factors)
    axes.set_xlim(math.log2(least) - 0.1, math.log2(most) + ROOM)
    ticks = [tick for tick in TICKS if least <= tick <= most]
    axes.set_xticks([math.log2(tick) for tick in ticks], [f"{tick:g}x" for tick in ticks], fontsize=POINTS)
    axes.set_yticks([])
    axes.axvline(0, color="black", linewidth=1)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.xaxis.set_ticks_position("top")
    axes.tick_params(axis="x", length=0)
    for line, text in enumerate(HEADING):
        figure.text(0.02, 1 - (0.25 + 0.24 * line) / height, text, fontsize=POINTS, weight=None if line else "bold")
    figure.savefig(path, pil_kwargs={"optimize": True})


def arrange(report: stored.Report) -> tuple[list[Bar], dict[float, str], dict[float, str]]:
    """The bars, the cases' names and the operators' titles, by how far down they lie."""
    bars: list[Bar] = []
    labels: dict[float, str] = {}
    titles: dict[float, str] = {}
    y, before = BETWEEN_OPERATORS, None
    for (operator, case), timings in report.items():
        if operator != before:
            y += BETWEEN_OPERATORS if before else 0
            titles[y - BAR] = operator
            before = operator
        own = bars_of(timings, y + BAR / 2)
        if not own:
            continue
        bars += own
        labels[sum(bar.y for bar in own) / len(own)] = case
        y = own[-1].y + BAR / 2 + BETWEEN_CASES
    return bars, labels, titles


def bars_of(timings: Mapping[str, stored.Timing], y: float) -> list[Bar]:
    """A case's bars, one below the other from ``y`` on."""
    bars = []
    for timing in COLOURS:
        own = stored.fastest(timings.get(timing, {}), FASTSEG)
        if own is not None and own.times_best_peer is not None:
            bars.append(Bar(y + BAR * len(bars), own.times_best_peer, own.ms, timing))
    return bars
