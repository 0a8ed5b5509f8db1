"""From what `benchmarks.third_party` measured to tables, in a file of their own and in the README."""

from __future__ import annotations

import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.suite import COMPILE, EAGER, FASTSEG, KINDS, ONNXRUNTIME, OPENVINO, Contestant
from benchmarks.reports.formatting import MIB, NOTHING, factor, format_table, significant
from benchmarks.reports.report import Row, environment, label, memory_table, time_table

STEP, PREDICTION = TIMINGS = ("step", "prediction")
NAMES = {
    FASTSEG: "fastseg", EAGER: "eager", COMPILE: "torch.compile", OPENVINO: "OpenVINO", ONNXRUNTIME: "ONNX Runtime",
}  # fmt: skip
SECTION = "Models"  # the heading of the tables of times and memory

BEGIN = "<!-- third-party models: from here on written by python -m benchmarks.third_party -->"
END = "<!-- third-party models: up to here -->"

READING = """\
Places replaced in a training step (the loss and all gradients), and in a prediction (from images to class numbers, of
constant weights: torch.compile's and the backend's, too, with Inductor's setting "freezing"). "x" is how many times
faster fastseg is than the fastest other (of {peers}), or how many times less memory a step needs (the growth of the
resident set of a process whose blocks of memory have pages of their own), and which other that is; in bold where it is
slower, or needs more. Every result was verified against a float64 truth first.
"""


def insert(text: str, table: str) -> str:
    """``text`` with ``table`` between the two marks.

    Raises:
        ValueError: The marks aren't there, each once and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}, each once and in this order")
    return text[: text.index(BEGIN) + len(BEGIN)] + f"\n\n{table}\n" + text[text.index(END) :]


def write(run: dict[str, Any], path: Path) -> None:
    """Write all tables to ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {result["name"]: rows_of(result) for result in run["models"]}
    parts = ["# Third-party models\n", machine(run), summary(run), f"## {SECTION}\n", time_table(rows),
             memory_table(rows), places(run), missing(run)]  # fmt: skip
    path.write_text("\n".join(filter(None, parts)))


def rows_of(result: dict[str, Any]) -> dict[str, Row]:
    """A model's training step and its prediction."""
    rows = {timing: Row({}, {}, {}, {}, []) for timing in TIMINGS}
    for entry in result["measured"]:
        row, contestant = rows[entry["timing"]], Contestant(entry["kind"], entry["layout"])
        row.rounds[contestant] = entry["rounds"]
        if entry["peak"] is not None:
            row.peaks[contestant] = entry["peak"]
            row.extras[contestant] = max(entry["peak"] - entry["returned"], 0)
    for entry in result["missing"]:
        rows[entry["timing"]].missing[Contestant(entry["kind"], entry["layout"])] = ("failed", entry["reason"])
    return rows


def machine(run: dict[str, Any]) -> str:
    """What was measured, where and when."""
    seconds = sum(result["seconds"] for result in run["models"])
    spent = {kind: sum(result["compiling"][kind] for result in run["models"]) for kind in (COMPILE, FASTSEG)}
    compiling = "".join(f", {seconds:.0f} s to compile and verify {NAMES[kind]}" for kind, seconds in spent.items())
    return environment(run, seconds, compiling)


def summary(run: dict[str, Any]) -> str:
    """How to read it, and a line for each model."""
    return _reading(run) + "\n" + format_table(_lines(run, "images", "classes"))


def in_short(run: dict[str, Any]) -> str:
    """`summary` for the README, whose lines should fit a screen."""
    return _reading(run) + "\n" + format_table(_lines(run))


def _reading(run: dict[str, Any]) -> str:
    kinds = {entry["kind"] for result in run["models"] for entry in result["measured"]}
    peers = ", ".join(name for kind, name in NAMES.items() if kind in kinds - {FASTSEG})
    return textwrap.fill(READING.format(peers=peers), 120) + "\n"


def _lines(run: dict[str, Any], *beside: str) -> list[list[str]]:
    """A line for each model, with what it is measured on where that is asked for."""
    lines = [["model", *beside, "places: step, prediction", "training step", "prediction", "memory"]]
    for result in run["models"]:
        rows, sizes = rows_of(result), {"images": "x".join(map(str, result["images"])), "classes": result["classes"]}
        places = ", ".join(_places(result, timing) for timing in TIMINGS)
        figures = (time(rows[STEP]), time(rows[PREDICTION]), memory(rows[STEP]))
        lines.append([result["name"], *(str(sizes[name]) for name in beside), places, *figures])
    return lines


def _places(result: dict[str, Any], timing: str) -> str:
    counts = result["replaced"].get(timing)
    return NOTHING if counts is None else str(sum(counts.values()))


def time(row: Row) -> str:
    """Fastseg's milliseconds, and how many times faster it is than the fastest other."""
    own, other = row.fastest([FASTSEG]), row.fastest(KINDS[1:])
    if own is None:
        return NOTHING
    return f"{significant(1e3 * median(row.rounds[own]))} ms" + _compared(row.speedups(own, other), other)


def memory(row: Row) -> str:
    """Fastseg's MiB, and how many times less they are than the lowest peak of another."""
    own = min((one for one in row.peaks if one.kind == FASTSEG), key=row.peaks.__getitem__, default=None)
    other = min((one for one in row.peaks if one.kind != FASTSEG), key=row.peaks.__getitem__, default=None)
    if own is None:
        return NOTHING
    ratio = [] if other is None else [row.peaks[other] / row.peaks[own]]
    return f"{significant(row.peaks[own] / MIB)} MiB" + _compared(ratio, other)


def _compared(values: list[float], other: Contestant | None) -> str:
    return "" if other is None or not values else f", {factor(values).partition(' (')[0]} {NAMES[other.kind]}"


def places(run: dict[str, Any]) -> str:
    """What was replaced by what, and the backend's distance from eager PyTorch."""
    lines = [["model", *TIMINGS, "difference of the loss", "of the gradients"]]
    for result in run["models"]:
        line = [result["name"]]
        for timing in TIMINGS:
            counts = result["replaced"].get(timing)
            found = NOTHING if counts is None else ", ".join(f"{count} {name}" for name, count in counts.items())
            line.append(found or "nothing")
        lines.append([*line, *(scientific(result["difference"].get(name)) for name in ("loss", "gradients"))])
    return (
        "## Places\n\nWhat was replaced; the largest difference between the backend and eager PyTorch in float64, over "
        f"the largest value of eager's\n\n{format_table(lines)}"
    )


def scientific(value: float | None) -> str:
    """A number that is next to nothing."""
    return NOTHING if value is None else f"{value:.1e}"


def missing(run: dict[str, Any]) -> str:
    """Who failed or was left out, and why."""
    lines = [f"* {name}: {why}\n" for name, why in run["absent"].items()]
    for result in run["models"]:
        for entry in result["missing"]:
            reason = " ".join(entry["reason"].splitlines()[:2])
            contestant = label(Contestant(entry["kind"], entry["layout"]))
            lines.append(f"* {result['name']}, {entry['timing']}, {contestant}: `{reason}`\n")
    return "".join(["## Not measured\n\n", *lines]) if lines else ""
