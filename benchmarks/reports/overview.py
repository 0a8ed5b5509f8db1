"""The picture of the README's first screen: time and memory of five cases beside what others take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness.compile_time import COMPILE
from benchmarks.harness.suite import BOTH, EAGER, FASTSEG, FORWARD, OPENVINO
from benchmarks.reports import stored
from benchmarks.reports.formatting import significant
from benchmarks.reports.stored import Figures
from benchmarks.reports.third_party import SECTION, STEP

NAMES = {FASTSEG: "fastseg", EAGER: "eager", COMPILE: "torch.compile", OPENVINO: "OpenVINO"}
COLOURS = {FASTSEG: "#d1495b", EAGER: "#8d99ae", COMPILE: "#8d99ae", OPENVINO: "#8d99ae"}

# In inches, at 100 points each: 1200 points across, of which a letter is 35 high. A phone shows a third of that.
WIDTH, DOTS, POINTS = 12.0, 100, 23
ROW, TITLE, BETWEEN = 0.42, 0.5, 0.3
LABELS, TIMES, MEMORY = (0.0, 0.21), (0.22, 0.61), (0.63, 1.0)  # where the columns begin and end, in widths
NUMBERS = 0.5  # of a column is for the numbers beside the bars
UNKNOWN = "not known"


class Case(NamedTuple):
    """A case of the picture: what it is called there, and where its figures are."""

    title: str
    models: bool  # in the report of third-party models, not in the suite's
    section: str
    case: str
    timing: str


CASES = (
    Case("Loss: upsample + cross-entropy, 150 classes, training", False, "upsample_cross_entropy",
         "2x150x64x64->256x256", BOTH),
    Case("Prediction: upsample + argmax, 150 classes", False, "upsample_argmax", "2x150x64x64->256x256", FORWARD),
    Case("First layer: convolution + ReLU + max pool", False, "conv_relu_pool2d", "4x3x224x224->32", FORWARD),
    Case("Whole network: U-Net, prediction", False, "models", "UNet-4x3x192x256", FORWARD),
    Case("Whole network: Unet-resnet18 of SMP, training step", True, SECTION, "smp.Unet-resnet18", STEP),
)  # fmt: skip


def draw(suite: Path, models: Path, path: Path) -> None:
    """Draw `CASES` from the written reports of the suite and of the third-party models, of one machine."""
    reports = {False: stored.read(suite), True: stored.read(models)}
    found = [(case.title, figures_of(reports[case.models][case.section, case.case][case.timing])) for case in CASES]
    height = sum(TITLE + BETWEEN + ROW * len(figures) for _, figures in found) + 2 * TITLE
    figure = Figure(figsize=(WIDTH, height), facecolor="white", dpi=DOTS)
    axes = figure.add_axes((0.02, 0, 0.96, 1), xlim=(0, 1), ylim=(height, 0))
    axes.axis("off")
    axes.text(TIMES[0], TITLE / 2 + 0.1, "time", va="center", fontsize=POINTS, color="#555555")
    axes.text(MEMORY[0], TITLE / 2 + 0.1, "peak memory", va="center", fontsize=POINTS, color="#555555")
    y = TITLE
    for title, figures in found:
        axes.text(LABELS[0], y + TITLE / 2 + 0.05, title, va="center", weight="bold", fontsize=POINTS)
        y += TITLE
        for row, kind in enumerate(figures):
            weight = "bold" if kind == FASTSEG else None
            axes.text(LABELS[0], y + ROW * (row + 0.5), NAMES[kind], va="center", weight=weight, fontsize=POINTS)
        _bars(axes, y, TIMES, figures, lambda of: of.ms, "ms")
        _bars(axes, y, MEMORY, figures, lambda of: of.mib, "MiB")
        y += ROW * len(figures) + BETWEEN
    axes.text(
        LABELS[0], y + TITLE / 2, f"x: times less than the best other takes. {stored.machine(suite)}, float32",
        va="center", fontsize=POINTS - 3, color="#555555",
    )  # fmt: skip
    figure.savefig(path, pil_kwargs={"optimize": True})


def figures_of(timing: stored.Timing) -> dict[str, Figures]:
    """Of each of `NAMES` that was measured, the faster memory format."""
    found = {kind: stored.fastest(timing, kind) for kind in NAMES}
    return {kind: figures for kind, figures in found.items() if figures is not None}


def _bars(
    axes: Axes, y: float, column: tuple[float, float], figures: dict[str, Figures],
    value: Callable[[Figures], float | None], unit: str,
) -> None:  # fmt: skip
    """A column's bars of a case, the longest as long as there is room, and their numbers."""
    begin, end = column
    values = {kind: value(of) for kind, of in figures.items()}
    longest = max(known for known in values.values() if known is not None)
    for row, (kind, length) in enumerate(values.items()):
        middle, width = y + ROW * (row + 0.5), (end - begin) * (1 - NUMBERS) * (length or 0) / longest
        axes.barh(middle, width, 0.8 * ROW, left=begin, color=COLOURS[kind])
        text = UNKNOWN if length is None else f"{round(length, 1 if length < 100 else None):g} {unit}"
        if kind == FASTSEG and length is not None:
            text += times_of_best(length, [known for other, known in values.items() if known and other != FASTSEG])
        weight = "bold" if kind == FASTSEG else None
        axes.text(begin + width + 0.01, middle, text, va="center", weight=weight, fontsize=POINTS)


def times_of_best(own: float, others: list[float]) -> str:
    """How many times less than the best other; nothing where that is less."""
    times = min(others, default=0.0) / own
    return f", {significant(times, 2)}x" if times >= 1 else ""
