"""From pytest-benchmark's JSON to Markdown tables and a chart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.suite import BACKWARD, BOTH, EAGER, FASTSEG, FORWARD, KINDS, TIMINGS, Contestant

LAYOUTS = {"nchw": "NCHW", "channels_last": "channels_last"}
CONTESTANTS = [Contestant(kind, layout) for kind in KINDS for layout in LAYOUTS]
NOTHING = "-"
MIB = 2**20

READING = """\
Medians, with the first and the third quartile of the rounds in brackets. "x" is how many times faster fastseg is: the
other's time over fastseg's, taken within each round; below 1 fastseg is slower, in bold. The best peer is the fastest
of eager and torch.compile in either memory format, whatever fastseg's own. Forward is timed under `no_grad`; backward
is the second part of forward+backward. Peak memory is the growth of the process's resident set during one call. For
models, forward is a prediction, forward+backward the loss and all gradients.
"""


class Row(NamedTuple):
    """One timing of one case: its contestants' seconds in each round and peak bytes, or what made them fail."""

    rounds: dict[Contestant, list[float]]
    peaks: dict[Contestant, int]
    errors: dict[Contestant, str]

    def fastest(self, kinds: Iterable[str]) -> Contestant | None:
        """Of some kinds, the contestant with the lowest median."""
        candidates = [contestant for contestant in self.rounds if contestant.kind in kinds]
        return min(candidates, key=lambda contestant: median(self.rounds[contestant]), default=None)

    def speedups(self, own: Contestant | None, other: Contestant | None) -> list[float]:
        """How many times faster ``own`` is than ``other`` in each round; empty where one of them is missing."""
        if own not in self.rounds or other not in self.rounds:
            return []
        return [theirs / ours for ours, theirs in zip(self.rounds[own], self.rounds[other], strict=True)]

    def over_best_peer(self, own: Contestant | None) -> list[float]:
        """How many times faster ``own`` is than the best peer in each round."""
        return self.speedups(own, self.fastest(KINDS[1:]))


Rows = dict[tuple[str, str], dict[str, Row]]  # by operator and case, then by timing


def read_rows(run: dict[str, Any]) -> Rows:
    """The rows of a run, in its order."""
    rows: Rows = {}

    def place(info: dict[str, Any]) -> tuple[Row, Contestant]:
        timings = rows.setdefault((info["operator"], info["case"]), {timing: Row({}, {}, {}) for timing in TIMINGS})
        return timings[info["timing"]], Contestant(info["kind"], info["layout"])

    for benchmark in run["benchmarks"]:
        row, contestant = place(benchmark["extra_info"])
        row.rounds[contestant] = benchmark["stats"]["data"]
        if benchmark["extra_info"]["peak_bytes"] is not None:
            row.peaks[contestant] = benchmark["extra_info"]["peak_bytes"]
    for failure in run["failures"]:
        row, contestant = place(failure)
        row.errors[contestant] = failure["error"]
    return rows


def write(run: dict[str, Any], path: Path) -> None:
    """Write the tables to ``path`` (Markdown) and the chart beside it (PNG, of the same name)."""
    rows = read_rows(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = path.with_suffix(".png")
    draw(rows, chart)
    parts = [
        "# Benchmarks\n",
        machine(run),
        READING,
        f"![time over the best peer's, for every case]({chart.name})\n",
        summary(rows),
    ]
    for operator in dict.fromkeys(operator for operator, _ in rows):
        own = {case: timings for (of, case), timings in rows.items() if of == operator}
        parts += [f"## {operator}\n", time_table(own), memory_table(own)]
    path.write_text("\n".join([*parts, errors(rows)]))


# ---- tables ----


def machine(run: dict[str, Any]) -> str:
    """What was measured, where and when."""
    info, commit = run["machine_info"], run["commit_info"]
    fastseg, cpu = info["fastseg"], info["cpu"]
    name = cpu.get("brand_raw", info["machine"])
    changed = " with local changes" if commit.get("dirty") else ""
    return (
        f"* {name}, {cpu['count']} cores, {info['system']}; {fastseg['threads']} threads\n"
        f"* fastseg {fastseg['fastseg']} (commit {str(commit.get('id'))[:10]}{changed}), {fastseg['cpu_isa']} kernels\n"
        f"* torch {fastseg['torch']}, Python {info['python_version']}\n"
        f"* float32, {run['datetime'][:10]}\n"
    )


def summary(rows: Rows) -> str:
    """A line for each case: fastseg in its faster memory format, and the lowest peaks of forward+backward."""
    head = ["case", "forward ms", "x eager NCHW", "x best peer", "forward+backward ms", "x eager NCHW", "x best peer",
            "backward x best peer", "peak MiB", "lowest peer's MiB"]  # fmt: skip
    lines = [head]
    for names, timings in rows.items():
        line = [" ".join(names)]
        for timing in (FORWARD, BOTH, BACKWARD):
            row = timings[timing]
            own = row.fastest([FASTSEG])
            if timing != BACKWARD:
                line += [milliseconds(row, own), factor(row.speedups(own, Contestant(EAGER, "nchw")))]
            line.append(factor(row.over_best_peer(own)))
        peaks = timings[BOTH].peaks
        line += [lowest_mebibytes(peaks, [FASTSEG]), lowest_mebibytes(peaks, KINDS[1:])]
        lines.append(line)
    return "## Summary\n\n" + format_table(lines)


def time_table(cases: dict[str, dict[str, Row]]) -> str:
    """Milliseconds of every contestant, and fastseg's factor in each memory format."""
    own = [Contestant(FASTSEG, layout) for layout in LAYOUTS]
    lines = [["case", "timing", *map(label, CONTESTANTS), *(f"{label(contestant)} x best peer" for contestant in own)]]
    for case, timings in cases.items():
        for timing, row in timings.items():
            factors = (factor(row.over_best_peer(contestant)) for contestant in own)
            lines.append([case, timing, *(milliseconds(row, contestant) for contestant in CONTESTANTS), *factors])
    return "Milliseconds\n\n" + format_table(lines)


def memory_table(cases: dict[str, dict[str, Row]]) -> str:
    """Peak memory of every contestant."""
    lines = [["case", "timing", *map(label, CONTESTANTS)]]
    for case, timings in cases.items():
        for timing in (FORWARD, BOTH):
            peaks = timings[timing].peaks
            lines.append([case, timing, *(mebibytes(peaks.get(contestant)) for contestant in CONTESTANTS)])
    return "Peak memory, MiB\n\n" + format_table(lines)


def errors(rows: Rows) -> str:
    """What failed, and why."""
    lines = [
        f"* {operator} {case}, {timing}, {label(contestant)}: `{error.splitlines()[0]}`\n"
        for (operator, case), timings in rows.items()
        for timing, row in timings.items()
        for contestant, error in row.errors.items()
    ]
    return "".join(["## Failed\n\n", *lines]) if lines else ""


def label(contestant: Contestant) -> str:
    """A contestant's name in the tables."""
    return f"{contestant.kind} {LAYOUTS[contestant.layout]}"


def milliseconds(row: Row, contestant: Contestant | None) -> str:
    """The median and the quartiles, in three significant digits."""
    if contestant in row.errors:
        return "failed"
    if contestant not in row.rounds:
        return NOTHING
    first, middle, third = (significant(1e3 * value) for value in quartiles(row.rounds[contestant]))
    return f"{middle} ({first} - {third})"


def factor(values: Sequence[float]) -> str:
    """A median factor and its quartiles; bold below 1."""
    if not values:
        return NOTHING
    first, middle, third = quartiles(values)
    text = f"{middle:.2f}x"
    return f"{text if middle >= 1 else f'**{text}**'} ({first:.2f} - {third:.2f})"


def mebibytes(size: int | None) -> str:
    """Bytes as MiB."""
    return NOTHING if size is None else f"{size / MIB:.1f}"


def lowest_mebibytes(peaks: dict[Contestant, int], kinds: Iterable[str]) -> str:
    """The lowest peak of some kinds of contestants."""
    return mebibytes(min((peak for contestant, peak in peaks.items() if contestant.kind in kinds), default=None))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third."""
    first, middle, third = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return first, middle, third


def significant(value: float, digits: int = 3) -> str:
    """A positive number in a few significant digits, without an exponent."""
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(value)))}f}"


def format_table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])) + "\n"


# ---- chart ----


def draw(rows: Rows, path: Path) -> None:
    """Every contestant's time over the best peer's: a panel for each timing, a line for each case."""
    figure = Figure(figsize=(13, 1.5 + 0.4 * len(rows)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(TIMINGS), sharey=True)
    colours = dict(zip(KINDS, ("C3", "C0", "C2"), strict=True))
    markers = dict(zip(LAYOUTS, ("s", "o"), strict=True))
    for panel, timing in zip(panels, TIMINGS, strict=True):
        for contestant in CONTESTANTS:
            # How many times faster the best peer is; NaN, where there is no such contestant, isn't drawn.
            points = [
                median(row.speedups(row.fastest(KINDS[1:]), contestant) or [math.nan])
                for row in (timings[timing] for timings in rows.values())
            ]
            panel.plot(
                points, range(len(rows)), linestyle="none", marker=markers[contestant.layout],
                color=colours[contestant.kind], alpha=0.8, label=label(contestant),
            )  # fmt: skip
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=timing, xscale="log", xlabel="time over the best peer's (left is faster)")
        panel.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], map(str, ticks))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [" ".join(names) for names in rows])
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(CONTESTANTS))
    figure.savefig(path, dpi=80)
