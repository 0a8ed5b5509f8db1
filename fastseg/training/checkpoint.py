"""Checkpoints: one safetensors file that holds a network, what is needed to use it, and what is needed to continue.

Tensors are named ``model.<name in the state_dict>`` and ``optimizer.<number of the parameter>.<name>``. Everything
else is JSON in the file's header, under the key ``fastseg``. Loading one executes no code.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastseg.models import SegmentationModel
from fastseg.training.config import Backend, ModelKind, TrainConfig
from fastseg.training.errors import CheckpointError
from fastseg.training.history import EpochRecord
from fastseg.training.networks import NETWORKS

FORMAT_VERSION = 1

_HEADER_KEY = "fastseg"
_MODEL_PREFIX = "model."
_OPTIMIZER_PREFIX = "optimizer."


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a checkpoint holds beside tensors.

    Args:
        model: Name of the network.
        arguments: All arguments of its constructor.
        class_names: A name for each class.
        ignore_index: Label of the pixels that don't count.
        mean: Mean of each channel that images are normalised with, of images in 0..1.
        std: Standard deviation of each channel.
        size: ``(height, width)`` that images are resized to; None for their own.
        class_weights: Weight of each class in the loss; None for equal ones.
        config: The settings of the run.
        history: The measurements of the epochs that the weights have seen.
    """

    model: ModelKind
    arguments: dict[str, Any]
    class_names: tuple[str, ...]
    ignore_index: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    class_weights: tuple[float, ...] | None
    config: TrainConfig
    history: tuple[EpochRecord, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def epoch(self) -> int:
        """The number of epochs that the weights have seen."""
        return len(self.history)

    def to_json(self) -> str:
        """The metadata as the text of a JSON object."""
        fields = {**dataclasses.asdict(self), "config": self.config.to_json(), "version": FORMAT_VERSION}
        return json.dumps(fields, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Metadata:
        """The metadata whose `to_json` is ``text``.

        Raises:
            KeyError, TypeError, ValueError: ``text`` isn't such an object, or one of another version.
        """
        fields = dict(json.loads(text))
        if (version := fields.pop("version")) != FORMAT_VERSION:
            raise ValueError(f"its format version is {version!r}, not {FORMAT_VERSION}")
        for name in ("class_names", "mean", "std", "size", "class_weights"):
            fields[name] = _tupled(fields[name])
        fields["arguments"] = {name: _tupled(value) for name, value in fields["arguments"].items()}
        fields["config"] = TrainConfig.from_json(fields["config"])
        fields["history"] = tuple(EpochRecord.from_json(record) for record in fields["history"])
        metadata = cls(**fields)
        if metadata.arguments["num_classes"] != metadata.num_classes:
            raise ValueError(f"{metadata.num_classes} class names for {metadata.arguments['num_classes']} classes")
        return metadata


def save_checkpoint(
    path: str | Path, model: nn.Module, metadata: Metadata, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write a checkpoint atomically: whatever interrupts this, ``path`` is the old file or the new one, whole.

    Args:
        path: The file to write or to replace.
        model: The network.
        metadata: What its checkpoint says of it.
        optimizer: The optimizer, if training is to be continued from this file.
    """
    tensors = {_MODEL_PREFIX + name: value for name, value in model.state_dict().items()}
    if optimizer is not None:
        for number, state in optimizer.state_dict()["state"].items():
            values = {
                name: value for name, value in state.items() if value is not None
            }  # SGD without momentum has None
            tensors.update({f"{_OPTIMIZER_PREFIX}{number}.{name}": value for name, value in values.items()})
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_atomically(Path(path), safetensors.torch.save(stored, metadata={_HEADER_KEY: metadata.to_json()}))


def load_checkpoint(path: str | Path, *, backend: Backend = "fastseg") -> tuple[SegmentationModel, Metadata]:
    """Load the network of a checkpoint, on the CPU, in training mode.

    Args:
        path: A file that `save_checkpoint` wrote.
        backend: ``"fastseg"``, or ``"plain"`` for the same network in plain PyTorch.

    Returns:
        The network and what the checkpoint says of it.

    Raises:
        CheckpointError: The file can't be read, is no checkpoint of fastseg, or its weights don't fit its network.
    """
    tensors, metadata = _read(Path(path))
    weights = _with_prefix(tensors, _MODEL_PREFIX)
    try:
        with torch.device("meta"):  # the shapes alone: a wrong header can't ask for memory that the file doesn't fill
            model = NETWORKS[backend][metadata.model](**metadata.arguments)
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: the weights don't fit the network {metadata.model!r}: {reason}") from error
    return model, metadata


def load_training_state(path: str | Path, model: SegmentationModel, optimizer: torch.optim.Optimizer) -> Metadata:
    """Load weights and optimizer state of a checkpoint into a run that is to continue.

    Args:
        path: A file that `save_checkpoint` wrote, with an optimizer.
        model: The run's network; gets the weights.
        optimizer: The run's optimizer; gets the state, and keeps its own settings.

    Returns:
        What the checkpoint says of the run.

    Raises:
        CheckpointError: The file can't be read, is no checkpoint of fastseg, or doesn't fit network or optimizer.
    """
    tensors, metadata = _read(Path(path))
    state: dict[int, dict[str, Tensor]] = {}
    try:
        for key, value in _with_prefix(tensors, _OPTIMIZER_PREFIX).items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = value
        model.load_state_dict(_with_prefix(tensors, _MODEL_PREFIX))
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: doesn't fit the run to continue: {reason}") from error
    return metadata


def read_metadata(path: str | Path) -> Metadata:
    """What a checkpoint says of its network.

    Raises:
        CheckpointError: The file can't be read or is no checkpoint of fastseg.
    """
    return _read(Path(path))[1]


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
    """All tensors of a checkpoint, on the CPU, and its metadata."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: can't be read as a checkpoint: {error}") from error
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but no checkpoint of fastseg")
    try:
        return tensors, Metadata.from_json(header)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: no checkpoint that this fastseg reads: {error}") from error


def _tupled(value: Any) -> Any:
    """A tuple for a list, which is what JSON makes of one; anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
