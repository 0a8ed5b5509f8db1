"""From pytest-benchmark's JSON to Markdown tables, and from those to a chart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.harness.roofline import Ceilings, Work
from benchmarks.harness.suite import BACKWARD, BOTH, EAGER, FASTSEG, FORWARD, KINDS, TIMINGS, Contestant
from benchmarks.reports import charts
from benchmarks.reports.formatting import NOTHING, factor, format_table, mebibytes, significant, spread

LAYOUTS = {"nchw": "NCHW", "channels_last": "channels_last"}
CONTESTANTS = [Contestant(kind, layout) for kind in KINDS for layout in LAYOUTS]

# Bytes of extra memory below which a measurement is noise: Linux counts the peak of resident pages in batches of 32 for
# each core. (A GPU's allocator is exact.)
LEAST_EXTRA = 2**18

READING = """\
Medians, with the first and the third quartile of the rounds in brackets. "x" is how many times faster fastseg is: the
other's time over fastseg's, taken within each round; below 1 fastseg is slower, in bold. The best peer is the fastest
of all others in either memory format, whatever fastseg's own. Forward is timed under `no_grad`; backward is the second
part of forward+backward. For models, forward is a prediction, forward+backward the loss and all gradients. The roofline
is the time that a pass can't go below: what it has to read and write (each input and output once) at the peak of the
bandwidth, or its matrix operations at that of a large matrix product, whichever takes longer; the percentage is that
time over fastseg's. The peaks are the fastest that a large copy, an addition and a matrix product went in this run.
GFLOP/s and GB/s are fastseg's, with their share of the peak. The operations (a multiplication and an addition are two)
are those of plain dense convolutions: a kernel that saves multiplications (Winograd's algorithm, the zeros of the
gradient behind a pool) does fewer, and a rate past the peak, marked "effective", is none that the machine reaches. Of
the upsampling operators only the logits before upsampling count, in bytes alone: their interpolations and exponentials,
a few for each pixel and class, aren't in the roofline, nor in that of the models.
"""

READING_OF = {
    "cpu": """\
Peak memory is the growth of the process's resident set during one call; OpenVINO's isn't known, as it has its memory
from its compilation on. OpenVINO takes part forward, its weights fixed. What stays in the caches from call to call can
be faster than the roofline, which knows the memory alone.
""",
    "cuda": """\
Times are the device's, between events around the passes; the caches hold none of a call's data when it begins. Where a
call is shorter than its launch (the operators' cases without a roofline), calls follow each other from an idle device,
and the time is mostly the host's. cuDNN chooses its algorithms as torch has it by default (`cudnn.benchmark` is off).
Peak memory is what torch's allocator has given out at most during one call, beyond what it had before. torch.compile's
max-autotune runs without CUDA graphs, and in chosen cases: compiling takes too long for all.
""",
}


class Row(NamedTuple):
    """One timing of one case.

    Args:
        rounds: The contestants' seconds in each round.
        peaks: Their peak bytes.
        extras: The same without what the call returns, values and gradients.
        missing: Of those that weren't measured, whether they "failed" or were "skipped", and why.
        work: What each pass can't do without.
    """

    rounds: dict[Contestant, list[float]]
    peaks: dict[Contestant, int]
    extras: dict[Contestant, int]
    missing: dict[Contestant, tuple[str, str]]
    work: list[Work]

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

    def extra_over(self, own: Contestant, other: Contestant) -> str:
        """How many times as much extra memory ``other`` needs as ``own``; a bound where that needs next to none."""
        if own not in self.extras or self.extras.get(other, 0) < LEAST_EXTRA:
            return NOTHING
        times = self.extras[other] / max(self.extras[own], LEAST_EXTRA)
        return f"{'> ' if self.extras[own] < LEAST_EXTRA else ''}{significant(times)}x"


Rows = dict[tuple[str, str], dict[str, Row]]  # by operator and case, then by timing


def read_rows(run: dict[str, Any]) -> Rows:
    """The rows of a run, in its order."""
    rows: Rows = {}

    def place(info: dict[str, Any]) -> tuple[Row, Contestant]:
        timings = rows.setdefault(
            (info["operator"], info["case"]), {timing: Row({}, {}, {}, {}, []) for timing in TIMINGS}
        )
        return timings[info["timing"]], Contestant(info["kind"], info["layout"])

    for benchmark in run["benchmarks"]:
        info = benchmark["extra_info"]
        row, contestant = place(info)
        row.rounds[contestant] = benchmark["stats"]["data"]
        if info["peak_bytes"] is not None:
            row.peaks[contestant] = info["peak_bytes"]
            row.extras[contestant] = max(info["peak_bytes"] - info["returned_bytes"], 0)
        row.work[:] = [Work(*work) for work in info["work"]]
    for entry in run["missing"]:
        row, contestant = place(entry)
        row.missing[contestant] = ("skipped" if entry["skipped"] else "failed", entry["reason"])
    return rows


def contestants(rows: Iterable[Row]) -> list[Contestant]:
    """All who took part, in their usual order."""
    present = {contestant for row in rows for contestant in (*row.rounds, *row.missing)}
    return [contestant for contestant in CONTESTANTS if contestant in present]


def write(run: dict[str, Any], path: Path) -> None:
    """Write the tables to ``path`` (Markdown) and the chart beside it (PNG, of the same name)."""
    rows, ceilings = read_rows(run), Ceilings(**run["ceilings"])
    path.parent.mkdir(parents=True, exist_ok=True)
    chart = path.with_suffix(".png")
    parts = [
        "# Benchmarks\n",
        machine(run),
        READING,
        READING_OF[run["device"]["type"]],
        f"![how many times faster than the best peer, for every case]({chart.name})\n",
        summary(rows, ceilings),
    ]
    for operator in dict.fromkeys(operator for operator, _ in rows):
        own = {case: timings for (of, case), timings in rows.items() if of == operator}
        parts += [f"## {operator}\n", time_table(own), roofline_table(own, ceilings), memory_table(own)]
    parts += [missing(run, rows), log(run["log"])]
    path.write_text("\n".join(filter(None, parts)))
    charts.draw(path, chart)


# ---- tables ----


def machine(run: dict[str, Any]) -> str:
    """What was measured, where and when, and the peaks of the machine."""
    ceilings = Ceilings(**run["ceilings"])
    compiling = "".join(f", {seconds:.0f} s for {kind}" for kind, seconds in run["compiling"].items())
    return environment(run, run["seconds"], compiling) + (
        f"* peaks: {significant(ceilings.bytes_per_second / 1e9)} GB/s read and written, "
        f"{significant(ceilings.operations_per_second / 1e9)} GFLOP/s of a {run['device']['dtype']} matrix product\n"
    )


def environment(run: dict[str, Any], seconds: float, compiling: str) -> str:
    """What was measured, where and when: in so many seconds, of which those named in ``compiling`` were for that."""
    info, commit, device = run["machine_info"], run["commit_info"], run["device"]
    fastseg, cpu = info["fastseg"], info["cpu"]
    name = cpu.get("brand_raw", info["machine"])
    changed = " with local changes" if commit.get("dirty") else ""
    known = commit.get("id") not in (None, "unversioned", "unknown")  # as pytest-benchmark has it
    version = f"commit {commit['id'][:10]}{changed}" if known else "commit unknown"
    peers = "".join(f", {name} {version}" for name, version in run["peers"].items() if version)
    return (
        f"* {device['title']}\n"
        f"* {name}, {cpu['count']} cores, {info['system']}\n"
        f"* fastseg {fastseg['fastseg']} ({version})\n"
        f"* torch {fastseg['torch']}{peers}, Python {info['python_version']}\n"
        f"* {device['dtype']}, {run['datetime'][:10]}, {seconds:.0f} s in all{compiling}\n"
    )


def summary(rows: Rows, ceilings: Ceilings) -> str:
    """A line for each case: fastseg in its faster memory format, and the lowest peaks of all that it does."""
    head = ["case", "forward ms", "x eager NCHW", "x best peer", "of the roofline",
            "forward+backward ms", "x eager NCHW", "x best peer", "of the roofline",
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
            if timing != BACKWARD:
                line.append(share(row, own, ceilings))
        peaks = timings[BOTH].peaks or timings[FORWARD].peaks
        line += [lowest_mebibytes(peaks, [FASTSEG]), lowest_mebibytes(peaks, KINDS[1:])]
        lines.append(line)
    return "## Summary\n\n" + format_table(lines)


def time_table(cases: dict[str, dict[str, Row]]) -> str:
    """Milliseconds of every contestant, and fastseg's factor in each memory format."""
    everyone = contestants(row for timings in cases.values() for row in timings.values())
    own = [contestant for contestant in everyone if contestant.kind == FASTSEG]
    lines = [["case", "timing", *map(label, everyone), *(f"{label(contestant)} x best peer" for contestant in own)]]
    for case, timings in cases.items():
        for timing, row in timings.items():
            if not contestants([row]):  # without a gradient
                continue
            factors = (factor(row.over_best_peer(contestant)) for contestant in own)
            lines.append([case, timing, *(milliseconds(row, contestant) for contestant in everyone), *factors])
    return "Milliseconds\n\n" + format_table(lines)


def roofline_table(cases: dict[str, dict[str, Row]], ceilings: Ceilings) -> str:
    """What each timing can't do without, what that takes at least, and how near fastseg comes; "" where unknown."""
    own = [Contestant(FASTSEG, layout) for layout in LAYOUTS]
    heads = [f"{label(contestant)} {what}" for contestant in own for what in ("GFLOP/s", "GB/s", "of the roofline")]
    lines = [["case", "timing", "MB", "GFLOP", "floor ms", "bound by", *heads]]
    for case, timings in cases.items():
        for timing, row in timings.items():
            if not row.work:
                continue
            total = Work(*map(sum, zip(*row.work, strict=True)))
            line = [case, timing, significant(total.bytes / 1e6), significant(total.operations / 1e9),
                    significant(1e3 * ceilings.seconds(row.work)), " + ".join(ceilings.limits(row.work))]  # fmt: skip
            for contestant in own:
                line += [
                    rate(row, contestant, total.operations, ceilings.operations_per_second),
                    rate(row, contestant, total.bytes, ceilings.bytes_per_second),
                    share(row, contestant, ceilings),
                ]
            lines.append(line)
    return "Of the roofline\n\n" + format_table(lines) if len(lines) > 1 else ""


def memory_table(cases: dict[str, dict[str, Row]]) -> str:
    """Peak memory and extra memory of every contestant, and eager's extra memory over fastseg's."""
    everyone = contestants(row for timings in cases.values() for row in timings.values())
    own = [contestant for contestant in everyone if contestant.kind == FASTSEG]
    lines = [["case", "timing", *map(label, everyone), *(f"eager's extra over {label(one)}'s" for one in own)]]
    for case, timings in cases.items():
        for timing, row in timings.items():
            if timing == BACKWARD or not contestants([row]):
                continue
            sizes = (f"{mebibytes(row.peaks.get(one))} ({mebibytes(row.extras.get(one))})" for one in everyone)
            lines.append([case, timing, *sizes, *(row.extra_over(one, Contestant(EAGER, one.layout)) for one in own)])
    return (
        "Peak memory, MiB; in brackets the extra memory, without the values and gradients returned\n\n"
        + format_table(lines)
    )


def missing(run: dict[str, Any], rows: Rows) -> str:
    """Who failed or was left out, and why: two lines of it, as torch.compile's first only says that it failed."""
    lines = [f"* {name}: {why}\n" for name, why in run["absent"].items() if why]
    lines += [
        f"* {operator} {case}, {timing}, {label(contestant)}, {what}: `{' '.join(reason.splitlines()[:2])}`\n"
        for (operator, case), timings in rows.items()
        for timing, row in timings.items()
        for contestant, (what, reason) in row.missing.items()
    ]
    return "".join(["## Not measured\n\n", *lines]) if lines else ""


def log(lines: Sequence[str]) -> str:
    """What fastseg logged during the run: calls that it left to plain PyTorch."""
    return "".join(["## fastseg's log\n\n", *(f"* {line}\n" for line in lines)]) if lines else ""


def label(contestant: Contestant) -> str:
    """A contestant's name in the tables."""
    return f"{contestant.kind} {LAYOUTS[contestant.layout]}"


def milliseconds(row: Row, contestant: Contestant | None) -> str:
    """The median and the quartiles, in three significant digits."""
    if contestant in row.missing:
        return row.missing[contestant][0]
    if contestant not in row.rounds:
        return NOTHING
    return spread(row.rounds[contestant])


def share(row: Row, contestant: Contestant | None, ceilings: Ceilings) -> str:
    """The roofline's time over a contestant's median."""
    if contestant not in row.rounds or not row.work:
        return NOTHING
    return f"{100 * ceilings.seconds(row.work) / median(row.rounds[contestant]):.0f}%"


def rate(row: Row, contestant: Contestant, amount: int, peak: float) -> str:
    """An amount over a contestant's median, in billions for each second, and what part of the peak that is."""
    if contestant not in row.rounds or not amount:
        return NOTHING
    achieved = amount / median(row.rounds[contestant])
    return f"{significant(achieved / 1e9)} ({100 * achieved / peak:.0f}%{', effective' if achieved > peak else ''})"


def lowest_mebibytes(peaks: dict[Contestant, int], kinds: Iterable[str]) -> str:
    """The lowest peak of some kinds of contestants."""
    return mebibytes(min((peak for contestant, peak in peaks.items() if contestant.kind in kinds), default=None))
