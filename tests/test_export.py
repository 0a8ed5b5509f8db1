"""Exported networks give the network's classes, at other sizes than they were exported with, too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastseg import functional
from fastseg.export import ExportError, Format, export
from fastseg.models import FCN, UNet

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # the exporters' own

METADATA = {"classes": ["road", "café"], "mean": [0.5]}


class Quarter(nn.Module):
    """Logits of a quarter of the size, in an object, as transformers' networks give them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 300, 4, stride=4)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.conv(images))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "fcn": lambda: FCN(num_classes=4, widths=(8, 12)),
    "unet": lambda: UNet(num_classes=4, widths=(8, 12)),
    "quarter": Quarter,  # of more classes than a byte holds
}


def onnx(file: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file)
    return (
        lambda images: torch.from_numpy(session.run(["classes"], {"images": images.numpy()})[0]),
        session.get_modelmeta().custom_metadata_map["fastseg"],
    )


def openvino(file: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    package = pytest.importorskip("openvino")
    model = package.Core().read_model(file)
    compiled = package.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})  # else bfloat16, where it can
    return (
        lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0])),
        model.get_rt_info("fastseg").astype(str),
    )


def pt2(file: Path) -> tuple[Callable[[Tensor], Tensor], str]:
    extra = {"fastseg": ""}
    program = torch.export.load(file, extra_files=extra)
    return program.module(), extra["fastseg"]


FORMATS = {"onnx": ("network.onnx", onnx), "openvino": ("network.xml", openvino), "pt2": ("network.pt2", pt2)}


@pytest.mark.parametrize(
    ("network", "format"),
    [
        pytest.param("fcn", "onnx", marks=pytest.mark.full),  # as in tests/cli/test_tools.py
        ("quarter", "onnx"),
        ("unet", "openvino"),
        ("unet", "pt2"),
        ("quarter", "pt2"),
    ],
)
def test_gives_the_networks_classes(network: str, format: Format, tmp_path: Path) -> None:
    name, load = FORMATS[format]
    pytest.importorskip({"onnx": "onnxscript", "openvino": "openvino", "pt2": "torch"}[format])
    model = NETWORKS[network]()
    export(model, tmp_path / name, format, example=torch.randn(1, 3, 32, 48), metadata=METADATA)
    assert model.training  # as it was
    run, metadata = load(tmp_path / name)
    assert json.loads(metadata) == METADATA
    images = torch.randn(3, 3, 64, 80)
    with torch.no_grad():
        model.eval()
        logits = model(images) if network == "quarter" else SimpleNamespace(logits=model.logits(images))
        expected = functional.upsample_argmax(logits.logits, size=(64, 80))
    found = run(images)
    assert found.dtype == expected.dtype
    assert (found != expected).float().mean() < 1e-3
    assert {path.suffix for path in tmp_path.iterdir()} <= {".onnx", ".data", ".xml", ".bin", ".pt2"}


class Wrong(nn.Module):
    """A network that, traced, remembers the size that it was traced with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.conv(images)
        return -logits if torch.compiler.is_exporting() else logits


class Untraceable(Wrong):
    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images) * float(images.sum().item() > 0 and images.numpy().sum())


@pytest.mark.parametrize(("model", "message"), [(Wrong(), "other classes .* for .*%"), (Untraceable(), "can't trace")])
def test_nothing_is_written_that_is_wrong(model: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        export(model, tmp_path / "network.pt2", "pt2", example=torch.randn(1, 3, 32, 48))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "format", "example", "message"),
    [
        ("a.pt2", "tflite", torch.zeros(1, 3, 32, 32), "format: expected one of onnx, openvino, pt2, got 'tflite'"),
        ("a.pt2", "pt2", torch.zeros(3, 32, 32), r"example: expected images .* got \[3, 32, 32\]"),
        ("a.onnx", "openvino", torch.zeros(1, 3, 32, 32), "end in .xml"),
    ],
)
def test_refuses(name: str, format: str, example: Tensor, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(FCN(num_classes=4), tmp_path / name, format, example=example)
