"""ONNX Runtime as a peer: what a network is deployed with on a CPU, its weights fixed. An optional extra, ``bench``."""

from __future__ import annotations

import functools
import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness.deployment import OfImages

if TYPE_CHECKING:
    import onnxruntime

WARNINGS_ALONE = 3  # ONNX Runtime's level "error": what it warns of, of graphs that it simplifies, is not ours


@functools.cache
def version() -> str | None:
    """The installed ONNX Runtime's; None where there is none, or none of what exports models to it."""
    try:
        return [importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime")][-1]
    except importlib.metadata.PackageNotFoundError:
        return None


class Inference:
    """An inference of a network whose weights are fixed; called, it gives the output.

    What a call does, and what is timed, is one inference from its start to its end. Nothing is copied for it: input and
    output are bound once and lie in torch's memory, where the next call overwrites the output.

    Args:
        session: ONNX Runtime's session of a model of one input and one output.
        input: What it is called on, contiguous.
        model: What was exported.
    """

    def __init__(self, session: onnxruntime.InferenceSession, input: Tensor, model: OfImages) -> None:
        self.session, self.input = session, input  # ONNX Runtime knows the address alone
        self.binding = session.io_binding()
        _bind(self.binding.bind_input, session.get_inputs()[0].name, input)
        first = session.run(None, {session.get_inputs()[0].name: input.numpy()})[0]
        written = torch.from_numpy(np.ascontiguousarray(first))
        _bind(self.binding.bind_output, session.get_outputs()[0].name, written)
        self.output = model.as_nchw(written)

    def __call__(self, *_: Tensor) -> Tensor:
        """The output; the arguments are what is bound already."""
        self.session.run_with_iobinding(self.binding)
        return self.output


def deploy(function: Callable[..., Tensor], arguments: Sequence[Tensor], layout: str) -> Inference:
    """``function(*arguments)`` as an inference on the images, the first argument; all others are constants.

    It has as many threads as torch.

    Args:
        function: What to compute, in plain PyTorch.
        arguments: Its arguments, in NCHW.
        layout: The memory format of the images that it gets, and of the maps that it gives.
    """
    import onnxruntime

    images, *constants = arguments
    model = OfImages(function, constants, layout).eval()
    images = model.lay_out(images)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about its own dependencies
        program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = WARNINGS_ALONE
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return Inference(session, images, model)


def _bind(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    array = tensor.numpy()
    bind(name, "cpu", 0, array.dtype.type, list(array.shape), tensor.data_ptr())
