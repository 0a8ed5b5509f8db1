"""Networks of other libraries and of the user's own, by name and as objects."""

import math
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
from fastseg import models
from fastseg.data import ShapesDataset, save_mask
from fastseg.training import (
    Architecture,
    CheckpointError,
    ConfigError,
    Network,
    SegmentationData,
    SegmentationTask,
    TrainConfig,
    evaluate,
    load_checkpoint,
    networks,
    predict,
    train,
    trainer,
    tuning,
)
from fastseg.training._lightning import Trainer
from fastseg.training.config import Backend
from fastseg.training.losses import Loss
from tests.fusion.test_third_party_models import assert_alike_in_float64

CLASSES = 4
# What Lightning says of a Trainer that a test makes without more ado.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*is smaller than the logging interval"
)


def needs(library: str) -> pytest.MarkDecorator:
    missing = networks.importlib.util.find_spec(library.partition(".")[0]) is None
    return pytest.mark.skipif(missing, reason=f"{library} isn't installed: it comes with the extra [models]")


def case(model: str, stride: int, **options: object) -> object:
    architecture = Architecture(model, CLASSES, **options)
    library = architecture.library
    slow = [] if model == "smp:Unet" else [pytest.mark.models]
    return pytest.param(architecture, stride, id=model, marks=[needs(str(library)), *slow])


OTHERS = [
    case("smp:Unet", 1, encoder="resnet18"),
    case("smp:FPN", 4, encoder="resnet18"),
    case("torchvision:lraspp_mobilenet_v3_large", 8),
    case("torchvision:fcn_resnet50", 8),
    case("transformers:segformer-b0", 4),
]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    ShapesDataset(10, (40, 48)).write(root)  # sides of which 32 divides none
    return root


@pytest.fixture
def quick_compilation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend without Inductor, whose compilation takes a minute."""
    monkeypatch.setitem(networks.COMPILE, "fastseg", {"backend": "fastseg", "options": {"inner": "eager"}})
    yield
    torch._dynamo.reset()


def config(data: Path, out: Path, **settings: object) -> TrainConfig:
    given = {"epochs": 1, "batch_size": 4, "lr": 0.01, "val_fraction": 0.2, "device": "cpu", "backend": "eager"}
    return TrainConfig(data=data, out=out, **(given | settings))


def output_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits that a network gives itself, at the images' size."""
    output = model(images)
    if not isinstance(output, Tensor):
        output = output["out" if "out" in output else "logits"]
    return F.interpolate(output, images.shape[-2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("architecture", "stride"), OTHERS)
def test_logits_stay_at_the_networks_own_resolution(architecture: Architecture, stride: int) -> None:
    network = networks.build(architecture, "fastseg").eval()
    images, masks = torch.randn(2, 3, 64, 96), torch.randint(CLASSES, (2, 64, 96))
    masks[:, :9] = 255
    with torch.no_grad():
        (logits,) = network(images)
        expected = output_of(network.model, images)
    assert logits.shape == (2, CLASSES, 64 // stride, 96 // stride)
    upsampled = F.interpolate(logits, masks.shape[-2:], **network.grid)
    torch.testing.assert_close(upsampled, expected, atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(expected, masks, ignore_index=255)
    torch.testing.assert_close(Loss(network, "ce", 255)(logits, masks), loss)
    # A tie of two classes may go either way, by float32's rounding of the interpolation.
    assert (network.predict(images) != expected.argmax(1)).float().mean() < 1e-3


@pytest.mark.parametrize(("architecture", "stride"), OTHERS[:1] + OTHERS[2:3] + OTHERS[4:])
def test_any_network_trains_evaluates_and_predicts(
    shapes: Path, tmp_path: Path, architecture: Architecture, stride: int
) -> None:
    settings = {"model": architecture.model, "encoder": architecture.encoder}
    history = train(config(shapes, tmp_path / "run", epochs=2, **settings))
    assert history.epochs[1].train_loss < history.epochs[0].train_loss
    for name in ("best.safetensors", "last.ckpt"):
        checkpoint = tmp_path / "run" / name
        (loss, scores), metadata = evaluate(checkpoint, shapes, device="cpu", backend="eager")
        assert metadata.network.model == architecture.model
        assert loss == pytest.approx(metadata.history[-1].val_loss, rel=1e-5)
        assert scores.mean_iou == pytest.approx(metadata.history[-1].mean_iou, rel=1e-5)
    (mask,) = predict(checkpoint, [shapes / "images" / "00001.png"], tmp_path / "out", device="cpu", backend="eager")
    assert mask.exists()


@needs("segmentation_models_pytorch")
def test_the_backend_trains_as_plain_pytorch(quick_compilation: None) -> None:
    architecture = Architecture("smp:Unet", CLASSES, encoder="resnet18")
    shapes = ShapesDataset(4, (40, 48))
    data = DataLoader([(image / 255, mask) for image, mask in map(shapes.__getitem__, range(4))], 2)

    def run(backend: Backend, precision: str) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        network = networks.build(architecture, backend)
        task = SegmentationTask(
            networks.compiled(network, architecture, backend, dynamic=False), optimizer="sgd", lr=0.01
        )
        fit = Trainer(max_epochs=2, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
        fit.fit(task, data, data)
        losses = torch.stack([fit.callback_metrics[name] for name in ("train_loss", "val_loss")])
        return network, {"losses": losses, **network.state_dict()}

    runs = [run("fastseg", "64-true"), run("eager", "64-true"), run("eager", "32-true")]
    assert_alike_in_float64(runs[0][0], *(results for _, results in runs))


class TwoHeads(nn.Module):
    """A convolution with an auxiliary head, on an encoder."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(in_channels, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.main, self.auxiliary = nn.Conv2d(8, num_classes, 1), nn.Conv2d(8, num_classes, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.encoder(images)
        return {"aux": self.auxiliary(features), "out": self.main(features)}


def two_heads(num_classes: int, in_channels: int) -> nn.Module:
    return TwoHeads(num_classes, in_channels)


def loader(items: list) -> SegmentationData:
    return SegmentationData(items, items[:2], batch_size=2)


def test_lightnings_own_trainer_fits_a_network_without_the_command(tmp_path: Path) -> None:
    task = SegmentationTask(TwoHeads(CLASSES, 3), CLASSES, lr=0.01)
    before = {name: value.clone() for name, value in task.network.named_parameters()}
    plain = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    plain.fit(task, loader([ShapesDataset(8, (32, 32))[number] for number in range(8)]))
    assert {"train_loss", "val_loss", "val_mean_iou", "val_pixel_accuracy"} <= plain.callback_metrics.keys()
    assert len(task.evaluation.scores.iou) == CLASSES
    assert all(not torch.equal(before[name], value) for name, value in task.network.named_parameters())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_auxiliary_heads_count_in_the_training_loss(weight: float) -> None:
    task = SegmentationTask(TwoHeads(CLASSES, 3), CLASSES, auxiliary_weight=weight)
    task.trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    task.log = lambda *_, **__: None  # type: ignore[method-assign]
    images, masks = torch.randn(2, 3, 16, 16), torch.randint(CLASSES, (2, 16, 16))
    task.network.eval()
    output = {
        name: F.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
        for name, logits in task.network.model(images).items()
    }
    expected = F.cross_entropy(output["out"], masks) + weight * F.cross_entropy(output["aux"], masks)
    torch.testing.assert_close(task.training_step((images, masks), 0), expected)


@pytest.mark.parametrize(
    ("layer", "grid"),
    [
        (nn.Upsample(scale_factor=2, mode="bilinear"), ("bilinear", False)),
        (nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), ("bilinear", True)),
        (nn.Upsample(scale_factor=2, mode="nearest"), ("nearest", False)),
    ],
    ids=["half-pixel", "corners", "nearest"],
)
def test_the_upsampling_at_the_end_of_a_sequence_is_left_out(layer: nn.Module, grid: tuple[str, bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, CLASSES, 3, 2, 1), layer)
    network, images = Network(model, CLASSES), torch.randn(1, 3, 16, 16)
    assert (network.grid["mode"], network.grid["align_corners"]) == grid
    assert network.logits(images).shape == (1, CLASSES, 8, 8)
    assert torch.equal(network.predict(images), model(images).argmax(1).to(torch.uint8))


@pytest.fixture
def five_channels(tmp_path: Path) -> Path:
    """Images of five 16-bit channels, as satellites give them."""
    tifffile = pytest.importorskip("tifffile", reason="tifffile isn't installed: it comes with the extra [train]")
    for folder in ("images", "masks"):
        (tmp_path / "five" / folder).mkdir(parents=True)
    for number in range(6):
        mask = np.random.default_rng(number).integers(0, 2, (24, 24), dtype=np.uint8)
        image = np.stack([mask.astype(np.uint16) * 1000 * channel for channel in range(1, 6)], 2)
        tifffile.imwrite(
            tmp_path / "five" / "images" / f"{number}.tif", image, photometric="minisblack", planarconfig="contig"
        )
        save_mask(mask, tmp_path / "five" / "masks" / f"{number}.png")
    return tmp_path / "five"


@pytest.mark.parametrize("model", ["fcn", f"{__name__}:two_heads"])
def test_the_data_say_the_number_of_channels(
    five_channels: Path, tmp_path: Path, model: str, quick_compilation: None
) -> None:
    train(config(five_channels, tmp_path / "run", model=model))
    checkpoint = tmp_path / "run" / "best.safetensors"
    network, metadata = load_checkpoint(checkpoint, model=model, backend="eager")
    assert metadata.network.in_channels == 5 == len(metadata.mean)
    assert next(network.parameters()).shape[1] == 5
    if ":" in model:
        with pytest.raises(CheckpointError, match="is called where model names it"):
            load_checkpoint(checkpoint)
        assert evaluate(checkpoint, five_channels, device="cpu", model=model)[1] == metadata


def test_a_frozen_encoder_keeps_its_weights_and_statistics(shapes: Path, tmp_path: Path) -> None:
    model = f"{__name__}:two_heads"
    train(config(shapes, tmp_path / "free", model=model))
    weights = str(tmp_path / "free" / "best.safetensors")
    train(config(shapes, tmp_path / "frozen", model=model, weights=weights, freeze_encoder=True))
    before, after = (
        load_checkpoint(tmp_path / name, model=model)[0].model.state_dict()
        for name in ("free/best.safetensors", "frozen/last.ckpt")
    )
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("encoder."), name


@pytest.mark.parametrize("kind", ["fcn", "unet"])
def test_own_networks_have_an_encoder_to_freeze(kind: str) -> None:
    network = networks.build(Architecture(kind, CLASSES), "fastseg")
    network.freeze_encoder()
    frozen = [name for name, parameter in network.model.named_parameters() if not parameter.requires_grad]
    assert {name.partition(".")[0] for name in frozen} == ({"stages"} if kind == "fcn" else {"expand", "pool"})


def test_a_network_without_an_encoder_is_named() -> None:
    with pytest.raises(ConfigError, match="Sequential has no encoder or backbone"):
        Network(nn.Sequential(nn.Conv2d(3, 2, 1)), 2).freeze_encoder()
    with pytest.raises(ConfigError, match="num_classes must be given: Sequential"):
        Network(nn.Sequential(nn.Conv2d(3, 2, 1)))


@needs("torchvision")
def test_weights_that_cannot_be_had_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    architecture = Architecture("torchvision:lraspp_mobilenet_v3_large", CLASSES)
    networks.build(architecture, "eager")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(ConfigError, match=r"^weights: the pretrained ones of torchvision:\S+ can't be had: .*no netw"):
        networks.build(architecture, "eager", pretrained=True)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers: install fastseg-kernels\[models\]"):
        networks.build(Architecture("transformers:segformer-b0", CLASSES), "eager")


def test_lr_and_batch_size_are_tuned_and_kept(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_LR_STEPS", 30)
    settings = {"lr": "auto", "batch_size": "auto", "widths": (4, 8)}
    train(config(shapes, tmp_path, **settings))
    chosen = load_checkpoint(tmp_path / "last.ckpt")[1].config
    assert 1e-8 < chosen.lr < 1
    assert 1 <= chosen.batch_size <= 8  # the training images
    assert (tmp_path / "lr_find.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*"))
    train(config(shapes, tmp_path, epochs=2, resume=True, **settings))
    again = load_checkpoint(tmp_path / "last.ckpt")[1]
    assert (again.config.lr, again.config.batch_size, again.epoch) == (chosen.lr, chosen.batch_size, 2)


def test_the_range_test_takes_where_the_loss_falls_fastest(tmp_path: Path) -> None:
    rates = np.geomspace(1e-8, 1, 100)
    steps, noise = np.log10(rates), np.random.default_rng(0).normal(scale=0.05, size=100)
    losses = 2.5 - 1.5 / (1 + np.exp(-4 * (steps + 3))) + np.exp(3 * (steps + 1)) + noise
    assert 3e-4 < tuning.steepest_descent(rates, losses, tmp_path / "picture.png") < 3e-3
    rising = [1.0, 1.1, 1.2, math.nan, 0.5]  # what comes after is no loss
    with pytest.raises(ConfigError, match="no step of the range test lowered the loss"):
        tuning.steepest_descent(rates, rising, tmp_path / "picture.png")


@pytest.mark.filterwarnings("ignore")  # the loggers' own
@pytest.mark.parametrize(
    ("logger", "file"),
    [("csv", "logs/*/metrics.csv"), ("tensorboard", "logs/*/events.*"), ("wandb", "wandb/offline-*/*.wandb")],
)
def test_a_logger_writes_its_file(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str, file: str
) -> None:  # fmt: skip
    pytest.importorskip(logger, reason=f"{logger} isn't installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(config(shapes, tmp_path, logger=logger, widths=(4, 8)))
    assert len(list(tmp_path.glob(file))) == 1


def test_a_run_without_progress_ends_early(shapes: Path, tmp_path: Path) -> None:
    history = train(config(shapes, tmp_path, epochs=50, lr=1e-12, early_stopping=2))
    assert len(history.epochs) == 3


def test_mixed_precision_trains_alike(shapes: Path, tmp_path: Path) -> None:
    settings = {"optimizer": "sgd", "backend": "fastseg"}
    (full,), (mixed,) = (
        train(config(shapes, tmp_path / name, precision=name, **settings)).epochs for name in ("fp32", "bf16")
    )
    assert mixed.val_loss != full.val_loss
    assert mixed.val_loss == pytest.approx(full.val_loss, rel=0.05)  # bfloat16 has 8 bits


@pytest.mark.parametrize("scheduled", ["poly", "cosine", "onecycle", "constant"])
def test_the_learning_rate_follows_its_schedule(scheduled: str) -> None:
    rates: list[float] = []

    class Task(SegmentationTask):
        def on_train_batch_end(self, *_: object) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    warmup = 0.0 if scheduled == "onecycle" else 1.0
    task = Task(models.FCN(num_classes=CLASSES, widths=(4,)), lr=0.01, schedule=scheduled, warmup=warmup)
    with trainer.quiet_lightning():
        trainer.new_trainer("cpu", max_epochs=4).fit(task, loader([ShapesDataset(8, (32, 32))[n] for n in range(8)]))
    assert len(rates) == 16  # 4 epochs of 4 steps; the rates are those of the steps that follow, if any
    del rates[-1]
    assert rates[:3] == sorted(rates[:3])
    assert max(rates) == pytest.approx(0.01, rel=0.1)
    if scheduled == "constant":
        assert rates[4:] == [0.01] * 11
    else:
        assert rates[6:] == sorted(rates[6:], reverse=True)
        assert rates[-1] < 0.002


def test_importing_the_package_leaves_lightning_alone() -> None:
    code = "import sys, fastseg.training, fastseg.cli.app; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
