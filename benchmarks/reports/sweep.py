"""From the JSON of a sweep to tables and a chart of the cost for each class and pixel."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.suite import EAGER, FASTSEG, Contestant, Swept
from benchmarks.reports.report import (
    NOTHING,
    Row,
    factor,
    format_table,
    log,
    machine,
    mebibytes,
    milliseconds,
    missing,
    read_rows,
    significant,
)

OWN, PEER = (Contestant(kind, "nchw") for kind in (FASTSEG, EAGER))

READING = """\
One image, upsampled fourfold, NCHW. "ns" are nanoseconds for each pixel of the output and each class (class-pixel): a
cost that grows linearly with both is a constant column. What a call costs at any size shows in the first lines.
Medians, with the first and the third quartile of the rounds in brackets; "x" is how many times faster fastseg is, taken
within each round. Extra memory is the peak without what the call returns, values and gradients.
"""


class Point(NamedTuple):
    """A case of a sweep, and what was measured of it."""

    swept: Swept
    timing: str
    row: Row

    def nanoseconds(self, contestant: Contestant) -> float | None:
        """The median for each class-pixel; None where it wasn't measured."""
        if contestant not in self.row.rounds:
            return None
        return 1e9 * median(self.row.rounds[contestant]) / self.swept.class_pixels


Sweeps = dict[tuple[str, str], list[Point]]  # by operator and what grows


def write(run: dict[str, Any], path: Path) -> None:
    """Write the tables to ``path`` (Markdown) and the chart beside it (PNG, of the same name)."""
    sweeps, chart = read_sweeps(run), path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(sweeps, chart)
    parts = ["# Sweeps\n", machine(run), READING, f"![nanoseconds for each class and pixel]({chart.name})\n"]
    for (operator, along), points in sweeps.items():
        parts += [f"## {operator}, {points[0].timing}, by {along}\n", table(along, points)]
    parts += [missing(run, read_rows(run)), log(run["log"])]
    path.write_text("\n".join(filter(None, parts)))


def read_sweeps(run: dict[str, Any]) -> Sweeps:
    """The points of every sweep, in the order of what grows."""
    rows = read_rows(run)
    entries = [*(benchmark["extra_info"] for benchmark in run["benchmarks"]), *run["missing"]]
    found = {(entry["operator"], entry["case"]): (Swept(*entry["swept"]), entry["timing"]) for entry in entries}
    sweeps: Sweeps = defaultdict(list)
    for (operator, case), (swept, timing) in found.items():
        sweeps[operator, swept.along].append(Point(swept, timing, rows[operator, case][timing]))
    for points in sweeps.values():
        points.sort(key=lambda point: point.swept.value)
    return sweeps


def table(along: str, points: Sequence[Point]) -> str:
    """A line for each point."""
    lines = [[along, "million class-pixels", "fastseg ms", "eager ms", "fastseg ns", "eager ns", "x eager",
              "fastseg extra MiB", "eager extra MiB", "eager's extra over fastseg's"]]  # fmt: skip
    for point in points:
        row = point.row
        lines.append([
            str(point.swept.value), significant(point.swept.class_pixels / 1e6),
            *(milliseconds(row, contestant) for contestant in (OWN, PEER)),
            *(_significant(point.nanoseconds(contestant)) for contestant in (OWN, PEER)),
            factor(row.speedups(OWN, PEER)),
            *(mebibytes(row.extras.get(contestant)) for contestant in (OWN, PEER)),
            row.extra_over(OWN, PEER),
        ])  # fmt: skip
    return format_table(lines)


def _significant(value: float | None) -> str:
    return NOTHING if value is None else significant(value)


def draw(sweeps: Sweeps, path: Path) -> None:
    """Nanoseconds for each class-pixel: a panel for each sweep, a line for each contestant."""
    operators, axes = (list(dict.fromkeys(names)) for names in zip(*sweeps, strict=True))
    figure = Figure(figsize=(6 * len(axes), 0.5 + 3.5 * len(operators)), layout="constrained")
    panels = figure.subplots(len(operators), len(axes), sharey="row", squeeze=False)
    for (operator, along), points in sweeps.items():
        panel: Axes = panels[operators.index(operator), axes.index(along)]
        for contestant, colour in ((OWN, "C3"), (PEER, "C0")):
            values = {point.swept.value: point.nanoseconds(contestant) for point in points}
            measured = {value: time for value, time in values.items() if time is not None}
            panel.plot([*measured], [*measured.values()], color=colour, marker="s", label=contestant.kind)
        panel.set(title=f"{operator}, {points[0].timing}", xscale="log", yscale="log", xlabel=along,
                  ylabel="ns per class-pixel")  # fmt: skip
        ticks = [point.swept.value for point in points]
        panel.set_xticks(ticks, map(str, ticks))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=80)
