"""Written reports read back: milliseconds and MiB of every contestant, for pictures that need no new measurement."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

TIMES, MEMORY = "Milliseconds", "Peak memory"  # how the lines above the tables begin
X_BEST_PEER = "x best peer"  # and how the heads of fastseg's factors end


class Figures(NamedTuple):
    """What a report says of a contestant in one timing of a case.

    Args:
        ms: The median's milliseconds.
        mib: Peak memory; None where it isn't known.
        times_best_peer: Of fastseg, how many times faster than the best peer it is; None of the others.
    """

    ms: float
    mib: float | None
    times_best_peer: float | None


Timing = dict[str, Figures]  # by contestant, as the heads name it
Report = dict[tuple[str, str], dict[str, Timing]]  # by section and case, then by timing


def read(path: Path) -> Report:
    """The figures of the report in ``path``."""
    report: Report = {}
    memory: dict[tuple[str, str, str, str], float] = {}
    for section, caption, line in _lines(path.read_text()):
        case, timing = line.get("case", ""), line.get("timing", "")
        if caption.startswith(TIMES):
            timings = report.setdefault((section, case), {}).setdefault(timing, {})
            for head, cell in line.items():
                if head not in ("case", "timing") and not head.endswith(X_BEST_PEER):
                    factor = _number(line.get(f"{head} {X_BEST_PEER}", ""))
                    if (ms := _number(cell)) is not None:
                        timings[head] = Figures(ms, None, factor)
        elif caption.startswith(MEMORY):
            for head, cell in line.items():
                if (mib := _number(cell)) is not None:
                    memory[section, case, timing, head] = mib
    return {
        (section, case): {
            timing: {
                head: figures._replace(mib=memory.get((section, case, timing, head)))
                for head, figures in of_timing.items()
            }
            for timing, of_timing in timings.items()
        }
        for (section, case), timings in report.items()
    }


def machine(path: Path) -> str:
    """The processor of a report, and how many cores it has."""
    processor = re.search(r"^\* (.+ cores), .+$", path.read_text(), re.MULTILINE)
    if processor is None:
        raise ValueError(f"{path} names no processor, as a report does")
    return processor[1]


def fastest(timing: Timing, kind: str) -> Figures | None:
    """A kind of contestant in its faster memory format; None where it wasn't measured."""
    return min((of for head, of in timing.items() if head.split()[0] == kind), default=None)


def _lines(text: str) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """The section, the caption and the cells of every line of every table."""
    section = caption = ""
    head: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            head = []
            if line.startswith("## "):
                section, caption = line.removeprefix("## "), ""
            elif line:
                caption = line
        elif not head:
            head = _cells(line)
        elif not set(line) <= set("|-: "):
            yield section, caption, dict(zip(head, _cells(line), strict=True))


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _number(cell: str) -> float | None:
    found = re.match(r"\*{0,2}(\d+(\.\d+)?)", cell)
    return float(found[1]) if found else None
