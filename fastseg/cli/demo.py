"""``fastseg demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.table import Table
from typer import Option

from fastseg.cli import options
from fastseg.data import ShapesDataset
from fastseg.training.demo import STEPS, TITLES, BackendRun, DemoResult, demonstrate

_MIB = 2**20


def demo(
    out: Annotated[Path, Option(help="Folder for demo.png and curves.png.")] = Path("runs/demo"),
    steps: Annotated[int, Option(min=1, help="Training steps of each run.")] = STEPS,
    seed: Annotated[int, Option(min=0, help="Seed of images, weights and batches.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Train FCN on generated images in plain PyTorch and by fastseg, and compare: about a minute on two cores."""
    console = Console()
    result = demonstrate(out, steps=steps, seed=seed, device=device, console=console)
    console.print(_table(result))
    for path in (result.picture, result.curves):
        console.print(str(path), soft_wrap=True, highlight=False)


def _table(result: DemoResult) -> Table:
    plain, fast = result.runs["eager"], result.runs["fastseg"]
    on_gpu = result.device.type == "cuda"
    memory = "the allocated device memory" if on_gpu else "the resident memory of a new process"
    table = Table(
        "",
        TITLES["eager"],
        TITLES["fastseg"],
        "difference",
        title=f"FCN after {len(fast.losses)} steps",
        caption=f"Logits: up to {result.logit_range:.1f}, of both networks with fastseg's final weights. "
        f"Peak memory: what a training step adds to {memory}.",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, ours, theirs in zip(_score_names(), _scores(fast), _scores(plain), strict=True):
        table.add_row(name, f"{theirs:.4f}", f"{ours:.4f}", f"{abs(ours - theirs):.1e}")
    table.add_section()
    table.add_row("training loss, at most", "", "", f"{result.loss_difference:.1e}")
    table.add_row("logits, at most", "", "", f"{result.logit_difference:.1e}")
    table.add_section()
    times = plain.seconds_per_step, fast.seconds_per_step
    table.add_row(
        "seconds per step, median", *(f"{value:.4f}" for value in times), f"{times[0] / times[1]:.2f}x as fast"
    )
    peaks = plain.peak_memory, fast.peak_memory
    table.add_row(
        "peak memory, MiB", *(f"{value / _MIB:.1f}" for value in peaks), f"{(peaks[1] - peaks[0]) / _MIB:+.1f}"
    )
    return table


def _score_names() -> list[str]:
    return ["validation loss", "pixel accuracy", "mean IoU", *(f"IoU {name}" for name in ShapesDataset.CLASSES)]


def _scores(run: BackendRun) -> list[float]:
    loss, scores = run.checks[-1]
    return [loss, scores.pixel_accuracy, scores.mean_iou, *scores.iou]
