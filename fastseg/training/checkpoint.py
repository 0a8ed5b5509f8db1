"""Checkpoints: what an epoch leaves, with a checksum, and loaded without executing code.

``best.safetensors`` holds a network's weights, named as in its state_dict, and in the file's header, as JSON under the
key ``fastseg``, the `Metadata`. ``last.ckpt`` is what Lightning needs to continue, in torch's format.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastseg.training import _records
from fastseg.training.config import Backend, TrainConfig
from fastseg.training.errors import CheckpointError, ConfigError
from fastseg.training.history import EpochRecord
from fastseg.training.networks import Architecture, Network, build, compiled, own_network

FORMAT_VERSION = 2

HEADER_KEY = "fastseg"
_CHECKSUM_KEY = "sha256"
_NO_CHECKSUM = "0" * 64  # in place of the checksum in what it is of
_WEIGHTS_PREFIX = "network.model."  # of the network in a SegmentationTask's state_dict
_ZIP_START = b"PK\x03\x04"
_ZIP_COMMENT = struct.Struct("<H")  # the length of a zip archive's comment, which ends the archive


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint holds beside tensors.

    Args:
        network: What it takes to build the network.
        class_names: A name for each class.
        palette: A colour for each class, RGB.
        ignore_index: Label of the pixels that don't count.
        mean: Mean of each channel that images are normalised with, of images in 0..1.
        std: Standard deviation of each channel.
        size: ``(height, width)`` that images are resized to; None for their own.
        class_weights: Weight of each class in the loss; None for equal ones.
        config: The settings of the run.
        history: The measurements of the epochs that the weights have seen.
    """

    network: Architecture
    class_names: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    ignore_index: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    class_weights: tuple[float, ...] | None
    config: TrainConfig
    history: tuple[EpochRecord, ...] = ()

    def __post_init__(self) -> None:
        for name, count in (
            ("class_names", self.num_classes), ("palette", self.num_classes), ("class_weights", self.num_classes),
            ("mean", self.network.in_channels), ("std", self.network.in_channels),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} must have {count} elements, but they are {value!r}")

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return self.network.num_classes

    @property
    def epoch(self) -> int:
        """The number of epochs that the weights have seen."""
        return len(self.history)

    def to_json(self) -> str:
        """The metadata as the text of a JSON object."""
        return json.dumps({**_records.to_json(self), "version": FORMAT_VERSION}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """The metadata whose `to_json` is ``text``.

        Raises:
            TypeError, ValueError: ``text`` isn't such an object, or one of another version.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("version", None) != FORMAT_VERSION:
            raise ValueError(f"its metadata aren't of version {FORMAT_VERSION}")
        return _records.from_json(cls, fields)


def colors_of(palette: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """The colours of a `fastseg.data.palette`, as `Metadata` has them."""
    return tuple((int(red), int(green), int(blue)) for red, green, blue in palette)


def save_checkpoint(path: str | Path, model: nn.Module, metadata: Metadata) -> None:
    """Write weights and metadata atomically: whatever interrupts this, ``path`` is the old file or the new one, whole.

    Args:
        path: The file to write or to replace.
        model: The network, not wrapped in `fastseg.training.networks.Network`.
        metadata: What its checkpoint says of it.
    """
    write_weights(Path(path), model.state_dict(), metadata.to_json())


def write_weights(path: Path, weights: dict[str, Tensor], metadata: str) -> None:
    """`save_checkpoint` of a state_dict."""
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    content = safetensors.torch.save(stored, metadata={HEADER_KEY: metadata, _CHECKSUM_KEY: _NO_CHECKSUM})
    blank = json.dumps(_NO_CHECKSUM).encode()
    write_atomically(path, content.replace(blank, json.dumps(_sha256(content)).encode(), 1))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what Lightning needs to continue; the checksum is the comment of torch's zip archive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    comment = _sha256(content).encode()
    write_atomically(path, content[: -_ZIP_COMMENT.size] + _ZIP_COMMENT.pack(len(comment)) + comment)


def read_state(path: Path) -> dict[str, Any]:
    """What `write_state` wrote, on the CPU.

    Raises:
        CheckpointError: The file can't be read, or isn't what was written.
    """
    content = _content(path)
    end = len(content) - len(_NO_CHECKSUM)
    start = end - _ZIP_COMMENT.size
    whole = content[:start] + _ZIP_COMMENT.pack(0)
    if content[start:end] != _ZIP_COMMENT.pack(len(_NO_CHECKSUM)) or content[end:] != _sha256(whole).encode():
        raise CheckpointError(f"{path}: damaged: the checksum isn't that of the content")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path}: can't be read as a checkpoint: {_line(error)}") from error
    return state


def load_checkpoint(
    path: str | Path, *, backend: Backend = "fastseg", model: str | None = None
) -> tuple[Network, Metadata]:
    """Load the network of a checkpoint, on the CPU, in training mode.

    Args:
        path: ``best.safetensors`` or ``last.ckpt`` of a run.
        backend: As in `TrainConfig`.
        model: The network's name, ``"package.module:function"``, where a function of the user's made it: a file alone
            can't have it called.

    Returns:
        The network, whose own library's object is its attribute ``model``, and what the checkpoint says of it.

    Raises:
        CheckpointError: The file can't be read, is damaged or no checkpoint of fastseg, or its weights don't fit its
            network.
        ConfigError: The network's library isn't installed.
    """
    weights, metadata = _read(Path(path))
    architecture = metadata.network
    if architecture.is_foreign and architecture.model != model:
        raise CheckpointError(
            f"{path}: its network is made by the function {architecture.model}, which is called where model names it"
        )
    try:
        if architecture.library is None:
            with torch.device("meta"):  # the shapes alone: a wrong header can't ask for memory the file doesn't fill
                own = own_network(architecture, backend)
            own.load_state_dict(weights, assign=True)
            network = Network(own, backend=backend)
        else:
            network = build(architecture, backend)
            network.model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(
            f"{path}: the weights don't fit the network {architecture.model!r}: {_line(error)}"
        ) from error
    return compiled(network, architecture, backend), metadata


def load_weights(path: Path, network: Network) -> tuple[int, int]:
    """Load the tensors of a file that fit a network by name and shape; the others of the network stay as they are.

    Args:
        path: A checkpoint of fastseg, or a state_dict that safetensors or torch.save wrote.
        network: Gets the tensors.

    Returns:
        How many tensors were loaded, and how many the network has.

    Raises:
        CheckpointError: The file can't be read, or none of its tensors fits.
    """
    content = _content(path)
    try:
        if content.startswith(_ZIP_START):
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            state = state.get("state_dict", state)
        else:
            state = safetensors.torch.load(content)
    except (pickle.UnpicklingError, RuntimeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read as weights: {_line(error)}") from error
    own = network.model.state_dict()
    named = {str(name).removeprefix(_WEIGHTS_PREFIX): value for name, value in state.items()}
    fitting = {
        name: value for name, value in named.items()
        if isinstance(value, Tensor) and name in own and value.shape == own[name].shape
    }  # fmt: skip
    if not fitting:
        raise CheckpointError(f"{path}: none of its {len(named)} tensors fits the network by name and shape")
    network.model.load_state_dict(fitting, strict=False)
    return len(fitting), len(own)


def read_metadata(path: str | Path) -> Metadata:
    """What a checkpoint says of its network.

    Raises:
        CheckpointError: The file can't be read, is damaged or no checkpoint of fastseg.
    """
    return _read(Path(path))[1]


def weights_of(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the network in what Lightning keeps."""
    return {
        name.removeprefix(_WEIGHTS_PREFIX): value
        for name, value in state["state_dict"].items()
        if name.startswith(_WEIGHTS_PREFIX)
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file by ``content`` in one step: readers and crashes see the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # also KeyboardInterrupt: no half-written file stays behind
        temporary.unlink(missing_ok=True)
        raise


def _read(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """The network's tensors in a checkpoint, on the CPU, and its metadata."""
    content = _content(path)
    if content.startswith(_ZIP_START):
        state = read_state(path)
        if not isinstance(state, dict) or not {HEADER_KEY, "state_dict"} <= state.keys():
            raise CheckpointError(f"{path}: no checkpoint of fastseg")
        weights, header = weights_of(state), state[HEADER_KEY]
    else:
        weights, header = _read_safetensors(path, content)
    try:
        return weights, Metadata.from_json(header)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint that this fastseg reads: {_line(error)}") from error


def _read_safetensors(path: Path, content: bytes) -> tuple[dict[str, Tensor], str]:
    try:
        tensors = safetensors.torch.load(content)
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read as a checkpoint: {_line(error)}") from error
    if HEADER_KEY not in header:
        raise CheckpointError(f"{path}: a safetensors file, but no checkpoint of fastseg")
    checksum = header.get(_CHECKSUM_KEY, "")
    whole = content.replace(json.dumps(checksum).encode(), json.dumps(_NO_CHECKSUM).encode(), 1)
    if _sha256(whole) != checksum:
        raise CheckpointError(f"{path}: damaged: the checksum isn't that of the content")
    return tensors, header[HEADER_KEY]


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read as a checkpoint: {error}") from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
