"""OpenVINO as a peer: what a network is deployed with on a CPU, its weights fixed. An optional extra, ``bench``."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.deployment import OfImages

if TYPE_CHECKING:
    import openvino

# By default OpenVINO computes in what is fastest on the CPU at hand, whatever the model's dtype.
PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@functools.cache
def version() -> str | None:
    """The installed OpenVINO's; None where there is none."""
    try:
        return importlib.metadata.version("openvino")
    except importlib.metadata.PackageNotFoundError:
        return None


class Inference:
    """An inference of a network whose weights are fixed; called, it gives the output.

    What a call does, and what is timed, is one inference from its start to its end. Nothing is copied for it: the input
    is bound once and lies in torch's memory, the output in OpenVINO's, where the next call overwrites it.

    Args:
        compiled: OpenVINO's compiled model, of one input and one output.
        input: What it is called on, contiguous.
        model: What was compiled.
    """

    def __init__(self, compiled: openvino.CompiledModel, input: Tensor, model: OfImages) -> None:
        self.input = input  # OpenVINO knows the address alone
        self.request = compiled.create_infer_request()
        self.request.set_input_tensor(_lend(input))
        self.request.infer()  # makes the output
        self.output = model.as_nchw(_borrow(self.request.get_output_tensor()))

    def __call__(self, *_: Tensor) -> Tensor:
        """The output; the arguments are what is bound already."""
        self.request.infer()
        return self.output


def deploy(function: Callable[..., Tensor], arguments: Sequence[Tensor], layout: str) -> Inference:
    """``function(*arguments)`` as an inference on the images, the first argument; all others are constants.

    It has as many threads as torch.

    Args:
        function: What to compute, in plain PyTorch.
        arguments: Its arguments, in NCHW: OpenVINO (2026.4) misreads bfloat16 constants in channels_last.
        layout: The memory format of the images that it gets, and of the maps that it gives.
    """
    openvino = _import()
    images, *constants = arguments

    of_images = OfImages(function, constants, layout).eval()
    images = of_images.lay_out(images)
    with torch.no_grad(), warnings.catch_warnings():
        # A trace holds for tensors of these sizes alone, which are all that it will get.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        model = openvino.convert_model(torch.jit.trace(of_images, (images,)), input=[tuple(images.shape)])
    options = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[images.dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "ENABLE_HYPER_THREADING": True,  # torch counts a core's second thread too
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(model, "CPU", options)
    if (threads := compiled.get_property("INFERENCE_NUM_THREADS")) != torch.get_num_threads():
        raise RuntimeError(f"OpenVINO takes {threads} threads, torch {torch.get_num_threads()}")
    return Inference(compiled, images, of_images)


def _import() -> ModuleType:
    """OpenVINO, which then sends nothing about its use: as long as the user hasn't opted out, it would."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def _lend(tensor: Tensor) -> openvino.Tensor:
    """A tensor of OpenVINO's in the memory of one of torch's."""
    openvino = _import()
    if tensor.dtype == torch.bfloat16:  # which numpy doesn't know
        return openvino.Tensor(tensor.view(torch.int16).numpy(), list(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


def _borrow(tensor: openvino.Tensor) -> Tensor:
    """A tensor of torch's in the memory of one of OpenVINO's."""
    if tensor.element_type == _import().Type.bf16:
        return torch.from_numpy(tensor.data.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(tensor.data)
