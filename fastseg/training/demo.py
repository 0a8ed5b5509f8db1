"""The demonstration: one network trained twice, in plain PyTorch and by fastseg, on the same generated images."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import default_collate

from fastseg.data import Normalize, ShapesDataset, colorize, palette
from fastseg.metrics import scores
from fastseg.models import SegmentationModel
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.devices import choose_device
from fastseg.training.errors import ConfigError
from fastseg.training.history import Evaluation
from fastseg.training.memory import peak_step_memory
from fastseg.training.networks import Architecture, build, own_network
from fastseg.training.plots import save_grid, save_panels

BACKENDS: tuple[Backend, ...] = ("eager", "fastseg")
TITLES = {"eager": "plain PyTorch", "fastseg": "fastseg"}
STEPS = 150  # about a minute for both on two cores
BATCH_SIZE = 8
SIZE = (96, 96)  # pixels
TRAIN_IMAGES, VAL_IMAGES = 256, 48
NETWORK = Architecture("fcn", len(ShapesDataset.CLASSES))
LEARNING_RATE = 3e-3
IGNORE_INDEX = 255  # generated masks have no ignored pixel
CHECKS = 10  # validations along the run
PICTURED = 4  # validation images in the picture


@dataclasses.dataclass
class BackendRun:
    """One of the two runs.

    Args:
        model: The network.
        losses: The loss of each step.
        seconds: The seconds of each step.
        checks: Loss and scores on the validation images along the run; the last are those of the final weights.
        peak_memory: How far a step raises the peak memory, in bytes.
    """

    model: SegmentationModel
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    checks: list[Evaluation] = dataclasses.field(default_factory=list)
    peak_memory: int = 0

    @property
    def seconds_per_step(self) -> float:
        """The median step's seconds."""
        return statistics.median(self.seconds)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The two runs side by side.

    Args:
        runs: A run for each of ``BACKENDS``.
        check_steps: The steps after which the runs were checked.
        loss_difference: Largest difference of the two losses of a step; rounding errors grow along a run.
        logit_difference: Largest difference of the two networks' logits with the same weights, fastseg's final ones.
        logit_range: Largest absolute logit there.
        picture: File with images, truth and predictions.
        curves: File with the training curves.
        device: Where it ran.
    """

    runs: dict[Backend, BackendRun]
    check_steps: list[int]
    loss_difference: float
    logit_difference: float
    logit_range: float
    picture: Path
    curves: Path
    device: torch.device


def demonstrate(
    out: str | Path,
    *,
    steps: int = STEPS,
    seed: int = 0,
    device: DeviceChoice = "auto",
    console: Console | None = None,
) -> DemoResult:
    """Train FCN on generated images in plain PyTorch and by fastseg, from the same weights on the same batches.

    The two take turns step by step, so that whatever slows the machine down meets both.

    Args:
        out: Folder for ``demo.png`` and ``curves.png``, made where it doesn't exist.
        steps: Training steps of each run.
        seed: Seed of the images, the initial weights and the batches. Seeds torch's global generator.
        device: As in `TrainConfig`.
        console: Where progress is shown; None for nowhere.

    Returns:
        What the two runs measured.

    Raises:
        ConfigError: ``steps`` or ``seed`` is out of range, or there is no such device.
    """
    if steps < 1 or seed < 0:
        raise ConfigError(f"steps must be at least 1 and seed at least 0, but they are {steps} and {seed}")
    place = choose_device(device)
    Path(out).mkdir(parents=True, exist_ok=True)
    shown = console if console is not None else Console(quiet=True)
    shown.print(f"generating {TRAIN_IMAGES + VAL_IMAGES} images", highlight=False)
    normalize = Normalize().to(place)
    pictured = _generate(VAL_IMAGES, seed + 1)
    training, validation = (
        (normalize(images.to(place)), masks.to(place)) for images, masks in (_generate(TRAIN_IMAGES, seed), pictured)
    )
    runs = _start(seed, place)
    check_steps = _train(runs, training, validation, steps, seed, shown)
    shown.print("measuring memory", highlight=False)
    for name, run in runs.items():
        run.peak_memory = peak_step_memory(name, NETWORK, (BATCH_SIZE, 3, *SIZE), place)
    losses = torch.tensor([run.losses for run in runs.values()])
    logit_difference, logit_range = _compare_logits(runs["fastseg"].model, validation[0])
    return DemoResult(
        runs=runs,
        check_steps=check_steps,
        loss_difference=(losses[0] - losses[1]).abs().max().item(),
        logit_difference=logit_difference,
        logit_range=logit_range,
        picture=_save_picture(runs, pictured, validation[0], Path(out)),
        curves=_save_curves(runs, check_steps, Path(out)),
        device=place,
    )


def _generate(length: int, seed: int) -> tuple[Tensor, Tensor]:
    dataset = ShapesDataset(length, SIZE, seed)
    images, masks = default_collate([dataset[index] for index in range(length)])
    return images, masks


def _start(seed: int, device: torch.device) -> dict[Backend, BackendRun]:
    """Both networks with the same weights."""
    torch.manual_seed(seed)
    state = build(NETWORK, "eager").model.state_dict()
    models = {backend: own_network(NETWORK, backend) for backend in BACKENDS}
    for model in models.values():
        model.load_state_dict(state)
    return {backend: BackendRun(model.to(device)) for backend, model in models.items()}


def _train(
    runs: dict[Backend, BackendRun],
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    steps: int,
    seed: int,
    console: Console,
) -> list[int]:
    """Train both runs; the result is the steps after which they were checked."""
    check_steps = sorted({-(-steps * check // CHECKS) for check in range(1, CHECKS + 1)})
    optimizers = {name: torch.optim.Adam(run.model.parameters(), LEARNING_RATE) for name, run in runs.items()}
    order = torch.Generator().manual_seed(seed)
    shown = track(range(1, steps + 1), "train", console=console, disable=not console.is_terminal)
    for step in shown:
        chosen = torch.randint(TRAIN_IMAGES, (BATCH_SIZE,), generator=order)
        images, masks = training[0][chosen], training[1][chosen]
        for name in BACKENDS if step % 2 else BACKENDS[::-1]:  # neither is always the first
            _step(runs[name], optimizers[name], images, masks)
        if step in check_steps:
            for run in runs.values():
                run.checks.append(_evaluate(run.model, *validation))
            reached = ", ".join(f"{name} {run.checks[-1].scores.mean_iou:.4f}" for name, run in runs.items())
            console.print(f"step {step}/{steps}: mean IoU {reached}", soft_wrap=True, highlight=False)
    return check_steps


@torch.no_grad()
def _evaluate(model: SegmentationModel, images: Tensor, masks: Tensor) -> Evaluation:
    logits = model.logits(images)
    loss = model.upsample_cross_entropy(logits, masks, ignore_index=IGNORE_INDEX)
    return Evaluation(loss.item(), scores(model.upsample_confusion_matrix(logits, masks, IGNORE_INDEX)))


def _step(run: BackendRun, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor) -> None:
    start = time.perf_counter()
    loss = run.model.loss(images, masks)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    run.seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())


def _compare_logits(model: SegmentationModel, images: Tensor) -> tuple[float, float]:
    """Largest difference of the logits to those of the plain network with the same weights, and the largest logit."""
    twin = own_network(NETWORK, "eager").to(images.device)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = twin(images)
        return (model(images) - expected).abs().max().item(), expected.abs().max().item()


def _save_picture(runs: dict[Backend, BackendRun], pictured: tuple[Tensor, Tensor], seen: Tensor, out: Path) -> Path:
    images, masks = (part[:PICTURED] for part in pictured)
    labels = {"truth": masks, **{TITLES[name]: run.model.predict(seen[:PICTURED]) for name, run in runs.items()}}
    colors = palette(len(ShapesDataset.CLASSES))
    columns = {"image": [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]}
    for name, values in labels.items():
        columns[name] = [colorize(value, colors, IGNORE_INDEX) for value in values]
    save_grid(columns, out / "demo.png")
    return out / "demo.png"


def _save_curves(runs: dict[Backend, BackendRun], check_steps: list[int], out: Path) -> Path:
    losses, scores = {}, {}
    for name, run in runs.items():
        losses[TITLES[name]] = run.losses
        scores[TITLES[name]] = [check.scores.mean_iou for check in run.checks]
    steps = range(1, len(next(iter(losses.values()))) + 1)
    save_panels(
        {"training loss": (steps, losses), "validation mean IoU": (check_steps, scores)}, "step", out / "curves.png"
    )
    return out / "curves.png"
