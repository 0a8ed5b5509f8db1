"""From what `benchmarks.third_party` measured to tables, in a file of their own and in the README."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.suite import COMPILE, EAGER, FASTSEG
from benchmarks.reports.report import MIB, NOTHING, environment, factor, format_table, significant, spread

STEP, PREDICTION = TIMINGS = ("step", "prediction")
KINDS = {EAGER: "eager", COMPILE: "torch.compile", FASTSEG: "fastseg"}

BEGIN = "<!-- third-party models: from here on written by python -m benchmarks.third_party -->"
END = "<!-- third-party models: up to here -->"

READING = """\
A step is the loss and the gradients of all parameters, a prediction goes from images to class numbers. Every result was
verified against a float64 truth before it was timed. Milliseconds and MiB, for eager PyTorch, `torch.compile` and
`torch.compile(..., backend="fastseg")`: medians of interleaved rounds; peak memory is the growth of the process's
resident set during a step, gradients included. In bold: fastseg is slower, or needs more, than the better of the two.
The largest differences are the backend's to eager PyTorch in float64, over the largest value of eager's.
"""


IN_SHORT = """\
Places replaced in a step (the loss and the gradients of all parameters) / in a prediction. Then eager PyTorch /
`torch.compile` / `torch.compile(..., backend="fastseg")`: milliseconds, and the peak MiB of a step, gradients included.
In bold: fastseg is slower, or needs more, than the better of the two. Every result was verified first.
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
    parts = ["# Third-party models\n", machine(run), summary(run), details(run), missing(run)]
    path.write_text("\n".join(filter(None, parts)))


def machine(run: dict[str, Any]) -> str:
    """What was measured, where and when."""
    seconds = sum(result["seconds"] for result in run["models"])
    spent = {kind: sum(result["compiling"][kind] for result in run["models"]) for kind in (COMPILE, FASTSEG)}
    compiling = "".join(f", {seconds:.0f} s to compile and verify {KINDS[kind]}" for kind, seconds in spent.items())
    return environment(run, seconds, compiling)


def summary(run: dict[str, Any]) -> str:
    """How to read it, and a line for each model."""
    names = list(KINDS.values())
    head = ["model", "images", "classes", "replaced: step", "prediction", "difference: loss", "gradients"]
    for what in ("step ms", "prediction ms", "peak MiB"):
        head += [f"{what}: {names[0]}", *names[1:]]
    lines = [head]
    for result in run["models"]:
        line = [result["name"], "x".join(map(str, result["images"])), str(result["classes"])]
        line += [str(sum(result["replaced"][timing].values())) for timing in TIMINGS]
        line += [scientific(result["difference"].get(name)) for name in ("loss", "gradients")]
        lines.append([*line, *milliseconds(result, STEP), *milliseconds(result, PREDICTION), *mebibytes(result)])
    return READING + "\n" + format_table(lines)


def in_short(run: dict[str, Any]) -> str:
    """`summary` for the README: the places replaced, step, prediction and memory."""
    lines = [["model", "places", "step ms", "prediction ms", "peak MiB"]]
    for result in run["models"]:
        places = [str(sum(result["replaced"][timing].values())) for timing in TIMINGS]
        triples = [[places[0], places[1]], *(milliseconds(result, timing) for timing in TIMINGS), mebibytes(result)]
        lines.append([result["name"], *(" / ".join(triple) for triple in triples)])
    return IN_SHORT + "\n" + format_table(lines)


def milliseconds(result: dict[str, Any], timing: str) -> list[str]:
    """A model's median times, `compared`."""
    return compared({kind: 1e3 * median(of["rounds"]) for kind, of in result["timings"][timing].items()})


def mebibytes(result: dict[str, Any]) -> list[str]:
    """The peak memory of a model's step, `compared`."""
    peaks = {kind: of["peak"] for kind, of in result["timings"][STEP].items()}
    return compared({kind: peak / MIB for kind, peak in peaks.items() if peak is not None})


def compared(values: dict[str, float]) -> list[str]:
    """A cell for each of `KINDS`; fastseg's bold where another's is lower."""
    cells = [significant(values[kind]) if kind in values else NOTHING for kind in KINDS]
    if FASTSEG in values and values[FASTSEG] > min(values.values()):
        cells[-1] = f"**{cells[-1]}**"
    return cells


def details(run: dict[str, Any]) -> str:
    """The spread of the times, fastseg's factors within each round, and what was replaced by what."""
    lines = [["model", "timing", *KINDS.values(), "x eager", "x torch.compile", "replaced by"]]
    for result in run["models"]:
        for timing in TIMINGS:
            rounds = {kind: of["rounds"] for kind, of in result["timings"][timing].items()}
            line = [result["name"], timing, *(spread(rounds[kind]) if kind in rounds else NOTHING for kind in KINDS)]
            line += [factor(speedups(rounds, kind)) for kind in (EAGER, COMPILE)]
            counts = result["replaced"][timing].items()
            lines.append([*line, ", ".join(f"{count} {operator}" for operator, count in counts) or "nothing"])
    return (
        "## Times\n\nMilliseconds with the first and the third quartile; how many times faster fastseg is, within each "
        f"round\n\n{format_table(lines)}"
    )


def speedups(rounds: dict[str, list[float]], kind: str) -> list[float]:
    """How many times faster fastseg is in each round."""
    return [theirs / ours for theirs, ours in zip(rounds.get(kind, ()), rounds.get(FASTSEG, ()), strict=False)]


def scientific(value: float | None) -> str:
    """A number that is next to nothing."""
    return NOTHING if value is None else f"{value:.1e}"


def missing(run: dict[str, Any]) -> str:
    """Who failed or was left out, and why."""
    lines = [f"* {name}: {why}\n" for name, why in run["absent"].items()]
    for result in run["models"]:
        for entry in result["missing"]:
            reason = " ".join(entry["reason"].splitlines()[:2])
            lines.append(f"* {result['name']}, {entry['timing']}, {KINDS[entry['kind']]}: `{reason}`\n")
    return "".join(["## Not measured\n\n", *lines]) if lines else ""
