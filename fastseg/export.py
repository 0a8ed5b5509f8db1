"""Networks as files that run elsewhere: images in, class numbers out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from fastseg import functional
from fastseg.inference import logits_of

Format = Literal["onnx", "openvino", "pt2"]

# Pixels whose class may differ from the network's own: logits that are all but equal, on other kernels.
TOLERATED = 1e-3


class ExportError(RuntimeError):
    """A network that can't be exported, or whose exported form gives other classes than it does."""


class Prediction(nn.Module):
    """A network's class numbers: argmax of its logits, upsampled to the images' size.

    Args:
        model: Gives logits ``[N, C, *any size]`` of images; as in `fastseg.sliding_window`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Class numbers ``[N, H, W]`` of images ``[N, channels, H, W]``."""
        # SegmentationModel's and fastseg.training.Network's aren't upsampled yet.
        logits = logits_of(getattr(self.model, "logits", self.model)(images))
        labels = functional.upsample_argmax(logits, size=tuple(images.shape[2:]), **getattr(self.model, "grid", {}))
        assert isinstance(labels, Tensor)
        return labels


def export(
    model: nn.Module,
    file: str | Path,
    format: Format,
    *,
    example: Tensor,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Write a network as a file that gives images' class numbers, for any number and size of images.

    The upsampling of the logits and their argmax are inside: the file takes images ``[N, channels, H, W]``, normalised
    as for the network, and gives class numbers ``[N, H, W]``, uint8 for up to 256 classes, else int64. What has been
    written is run on ``example`` and on a larger image, and compared with the network, before ``file`` appears.

    Args:
        model: As in `fastseg.sliding_window`; it is exported in evaluation mode, and afterwards again in the mode
            before.
        file: Where to write. OpenVINO's weights lie beside it, with the ending ``.bin``.
        format: "onnx" (torch.onnx, opset of its default), "openvino" (its intermediate representation, ``.xml``) or
            "pt2" (`torch.export.save`; running it needs fastseg, whose fused operators it holds).
        example: Images ``[N, channels, H, W]`` of a size that the network takes, float32, on a CPU.
        metadata: Written into the file as JSON, under the key "fastseg": class names, normalisation.

    Raises:
        ValueError: An argument doesn't fit; the message names it.
        ImportError: What the format needs isn't installed; the message names it.
        ExportError: The network can't be exported, or gives other classes than its file.
    """
    if format not in get_args(Format):
        raise ValueError(f"format: expected one of {', '.join(get_args(Format))}, got {format!r}")
    if example.ndim != 4 or example.is_cuda:
        raise ValueError(f"example: expected images [N, channels, H, W] on a CPU, got {list(example.shape)}")
    file = Path(file)
    if format == "openvino" and file.suffix != ".xml":
        raise ValueError(f"file: OpenVINO's files end in .xml, got {file}")
    text = json.dumps(dict(metadata or {}))
    training = model.training
    prediction = Prediction(model).eval()
    try:
        with torch.no_grad(), _quiet(), tempfile.TemporaryDirectory(dir=file.parent) as folder:
            written = Path(folder) / file.name
            run = _WRITERS[format](prediction, written, example, text)
            for images in (example, torch.cat([example, example.flip(2)], 2).repeat(2, 1, 1, 1)):
                _compare(run(images), prediction(images), images)
            for part in Path(folder).iterdir():
                os.replace(part, file.parent / part.name)
    finally:
        model.train(training)


Run = Callable[[Tensor], Tensor]


def _program(prediction: Prediction, example: Tensor) -> torch.export.ExportedProgram:
    """The network for any number and size of images."""
    images = torch.cat([example, example])  # a dimension of one would be taken for a constant
    sizes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    try:
        return torch.export.export(prediction, (images,), dynamic_shapes=(sizes,))
    except Exception as error:  # tracing runs the network's own code, which raises what it likes
        raise ExportError(f"torch.export can't trace the network: {error}") from error


def _write_pt2(prediction: Prediction, file: Path, example: Tensor, metadata: str) -> Run:
    torch.export.save(_program(prediction, example), file, extra_files={"fastseg": metadata})
    module = torch.export.load(file).module()
    return lambda images: module(images)


def _write_onnx(prediction: Prediction, file: Path, example: Tensor, metadata: str) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx.export's
    except ImportError as error:
        raise ImportError(f"ONNX needs onnx, onnxscript and onnxruntime: pip install {error.name}") from error
    program = torch.onnx.export(
        _program(prediction, example), (), dynamo=True, verbose=False, input_names=["images"],
        output_names=["classes"],
    )  # fmt: skip
    assert program is not None
    program.model.metadata_props["fastseg"] = metadata
    program.save(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _write_openvino(prediction: Prediction, file: Path, example: Tensor, metadata: str) -> Run:
    try:
        import openvino
    except ImportError as error:
        raise ImportError("OpenVINO needs openvino: pip install openvino") from error
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "network.onnx"
        _write_onnx(prediction, onnx, example, metadata)
        converted = openvino.convert_model(onnx)
    converted.set_rt_info(metadata, "fastseg")
    openvino.save_model(converted, file, compress_to_fp16=False)
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: torch.from_numpy(np.array(compiled(images.numpy())[0]))


_WRITERS: dict[str, Callable[[Prediction, Path, Tensor, str], Run]] = {
    "onnx": _write_onnx, "openvino": _write_openvino, "pt2": _write_pt2,
}  # fmt: skip


def _compare(found: Tensor, expected: Tensor, images: Tensor) -> None:
    """Refuse classes that aren't the network's."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ExportError(
            f"the file gives {list(found.shape)} of {found.dtype} for images {list(images.shape)}, the network "
            f"{list(expected.shape)} of {expected.dtype}"
        )
    share = (found != expected).double().mean().item()
    if share > TOLERATED:
        raise ExportError(f"the file gives other classes than the network for {share:.2%} of the pixels")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' own warnings and progress are of no use to who exports."""
    loggers: Sequence[logging.Logger] = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
