"""Segmented videos, by a checkpoint."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from fastseg.data import DataError
from fastseg.training.config import Backend, DeviceChoice
from fastseg.training.errors import ConfigError
from fastseg.training.prediction import Segmenter, Viewing

_WHOLE_FRAMES = Viewing()


def is_video(path: Path) -> bool:
    """Whether a file's name is that of a video."""
    return (mimetypes.guess_type(path.name)[0] or "").startswith("video/")


def predict_video(
    checkpoint: str | Path,
    video: str | Path,
    out: str | Path,
    *,
    alpha: float = 0.5,
    backend: Backend = "fastseg",
    device: DeviceChoice = "auto",
    model: str | None = None,
    viewing: Viewing = _WHOLE_FRAMES,
    colors: str | None = None,
    console: Console | None = None,
) -> int:
    """Write a video with the classes' colours over each frame of another, and a legend of all classes.

    Frames come at the video's mean rate, turned as the file says that they are to be shown; sound is left out.

    Args:
        checkpoint: A file that training wrote.
        video: Any file with a video that FFmpeg reads.
        out: File to write, whose ending says the format: ``.mp4``, ``.mkv``, ``.webm``, ``.avi``, ...
        alpha: As in `predict`, as are all that follow.
        backend: As in `TrainConfig`.
        device: As in `TrainConfig`.
        model: As in `load_checkpoint`.
        viewing: How the network looks at a frame.
        colors: One of `fastseg.data.PALETTES`; None for the checkpoint's.
        console: Where progress is shown; None for nowhere.

    Returns:
        The number of frames.

    Raises:
        CheckpointError: The file is no checkpoint that can be used.
        ConfigError: PyAV isn't installed, or ``out`` is no video, or the one to read.
        DataError: ``video`` can't be read, or the network can't take its frames.
    """
    video, out = Path(video), Path(out)
    av = _pyav()
    if not is_video(out) or out.resolve() == video.resolve():
        raise ConfigError(f"out must be another video for {video}, as in segmented.mp4, but it is {out}")
    segmenter = Segmenter(checkpoint, alpha, backend, device, model, viewing, colors)
    try:
        with av.open(video) as source:
            stream = next(iter(source.streams.video), None)
            if stream is None:
                raise DataError(f"{video}: holds no video")
            shown = console if console is not None else Console(quiet=True)
            frames = track(
                source.decode(stream), "predict", total=stream.frames or None, console=shown,
                disable=not shown.is_terminal,
            )  # fmt: skip
            with av.open(out, "w") as target:
                count = _write(av, target, stream.average_rate or stream.guessed_rate, segmenter, frames, video)
    except av.FFmpegError as error:
        raise DataError(f"{video}: can't be read and written as {out}: {error}") from error
    if not count:
        raise DataError(f"{video}: holds no frame")
    return count


def _write(av: ModuleType, target: Any, rate: Any, segmenter: Segmenter, frames: Iterable[Any], video: Path) -> int:
    """Segment frames into an open video, and count them."""
    legend = torch.arange(segmenter.metadata.num_classes)[None]  # all: frames have one size
    count, encoder = 0, None
    for frame in frames:
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
        image, mask, _ = segmenter.segment(pixels, video)
        picture = _even(np.asarray(segmenter.paint(image, mask, legend=legend)))
        if encoder is None:
            encoder = target.add_stream(target.default_video_codec, rate=rate)
            encoder.height, encoder.width = picture.shape[:2]
        painted = av.VideoFrame.from_ndarray(picture, format="rgb24")
        painted.pts, painted.time_base = count, 1 / rate
        target.mux(encoder.encode(painted))
        count += 1
    if encoder is not None:
        target.mux(encoder.encode(None))
    return count


def _pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise ConfigError("a video needs PyAV: pip install 'fastseg-kernels[video]'") from error
    return av


def _even(pixels: np.ndarray) -> np.ndarray:
    """A picture of even sides, which codecs want that halve the colours' resolution."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
