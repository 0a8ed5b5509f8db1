"""Prediction of images that are larger than what a network takes at once, and of several versions of an image."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseg import functional
from fastseg.ops.upsampling import MODES, upsampling_between
from fastseg.ops.volumes import blends_of

Blend = Literal["gaussian", "constant"]

# The standard deviation of a tile's weights in tiles' sides: at the middle of an edge they are e^-8 of the largest.
GAUSSIAN_SIGMA = 0.125


def sliding_window(
    model: nn.Module | Callable[[Tensor], Any],
    image: Tensor,
    tile: int | Sequence[int] = 1024,
    *,
    overlap: float = 0.25,
    blend: Blend = "gaussian",
    size: Sequence[int] | None = None,
    batch_size: int = 1,
    preprocess: Callable[[Tensor], Tensor] | None = None,
    return_confidence: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The class of each pixel of an image that the network sees tile by tile, in the memory of a band of tiles.

    The tiles' logits are weighted, ``w(y, x) = g(y) g(x)``, and summed where tiles overlap; a pixel gets the class of
    its largest sum. Tiles go row by row, so that a row of them is all that is ever held, ``C x tile x W`` numbers: as
    soon as no later tile reaches an image row, its classes are known and its logits forgotten. A volume's rows are
    slabs of voxels.

    Labels of another size, such as that of a scan before it was resampled for the network, are those of the weighted
    means of the logits, resampled linearly to it row by row: no tensor of C numbers a pixel is made for them either.

    The network runs as it is: put it into evaluation mode, on the device where it is to run, first. No gradients are
    recorded.

    Args:
        model: Takes images ``[B, channels, *tile]`` and gives logits ``[B, C, *any size]``, C > 1, which are upsampled
            to the tile's size; also a dictionary of them as "out" (torchvision) or an object with them as ``logits``
            (transformers).
        image: ``[channels, H, W]``, or ``[channels, D, H, W]``; any dtype that ``preprocess`` takes.
        tile: The tiles' sides, or one number for all. What is smaller than a tile is padded with zeros at its end.
        overlap: Share of a tile's side that it shares with its neighbour, in [0, 1).
        blend: "gaussian" weighs a tile's centre most (``g`` is a bell curve with a standard deviation of an eighth of
            the side); "constant" weighs all of it alike.
        size: The labels' size, ``(H, W)`` or ``(D, H, W)``; None for the image's.
        batch_size: Tiles to a call of the network.
        preprocess: Makes the network's input of a batch of tiles, before they are padded: to float, normalised, on its
            device. An image of bytes so stays one.
        return_confidence: Also return the softmax value of each pixel's class, of the weighted mean of the logits.

    Returns:
        Labels ``[H, W]`` or ``[D, H, W]``, or of ``size``, on the image's device, uint8 for up to 256 classes, else
        int64; where asked also the confidence, of that shape, float32.

    Raises:
        ValueError: A number or shape doesn't fit; the message names the argument.
    """
    sides = _sides(image, tile)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected a number in [0, 1), got {overlap}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if blend not in ("gaussian", "constant"):
        raise ValueError(f'blend: expected "gaussian" or "constant", got {blend!r}')
    extents = tuple(image.shape[1:])
    output = extents if size is None else _output_size(size, extents)
    starts = [_starts(extent, side, overlap) for extent, side in zip(extents, sides, strict=True)]
    weights = [_weights(side, blend)[:extent] for extent, side in zip(extents, sides, strict=True)]
    band: _Band | None = None
    results: list[Tensor] = []
    done = 0
    with torch.no_grad():
        for row, following in itertools.pairwise([*starts[0], extents[0]]):
            for corners in _batches(itertools.product(*starts[1:]), batch_size):
                tiles = torch.stack([_crop(image, (row, *corner), sides) for corner in corners])
                logits = _logits(
                    model, tiles if preprocess is None else preprocess(tiles), sides, tuple(tiles.shape[2:])
                )
                if band is None:
                    band = _Band(logits, extents, output, starts, weights)
                for corner, of_tile in zip(corners, logits, strict=True):
                    band.add(corner, of_tile)
            assert band is not None
            for parts in band.finish(row, following, return_confidence):
                results = results or [part.new_empty(output, device=image.device) for part in parts]
                for result, part in zip(results, parts, strict=True):
                    result[done : done + len(part)] = part
                done += len(parts[0])
    return (results[0], results[1]) if return_confidence else results[0]


class TestTimeAugmentation(nn.Module):
    """A network whose logits are the mean of those of an image's versions: mirrored, and of several sizes.

    Args:
        model: As in `sliding_window`.
        flip: Whether images go in mirrored left to right, too.
        scales: The versions' sizes in the image's, each rounded to a multiple of ``divisor``; 1 keeps it as it is.
        divisor: What the network's sizes have to be multiples of.
    """

    __test__ = False  # pytest collects what is called Test...

    def __init__(
        self,
        model: nn.Module | Callable[[Tensor], Any],
        *, flip: bool = True, scales: Sequence[float] = (1.0,), divisor: int = 32
    ) -> None:  # fmt: skip
        super().__init__()
        if not scales or not all(0 < scale < math.inf for scale in scales):
            raise ValueError(f"scales: expected numbers above 0, got {tuple(scales)}")
        self.model = model
        self.flip = flip
        self.scales = tuple(scales)
        self.divisor = divisor

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, C, h, w]`` of images ``[N, channels, H, W]``, in the size of those of the first version."""
        total: Tensor | None = None
        for scale in self.scales:
            scaled = images
            if scale != 1:
                size = [max(round(side * scale / self.divisor), 1) * self.divisor for side in images.shape[2:]]
                scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
            for mirrored in (False, True)[: 1 + self.flip]:
                logits = logits_of(self.model(scaled.flip(3) if mirrored else scaled))
                logits = logits.flip(3) if mirrored else logits
                if total is None:
                    total = logits
                    continue
                if logits.shape[2:] != total.shape[2:]:
                    logits = F.interpolate(logits, size=total.shape[2:], mode="bilinear", align_corners=False)
                total = total + logits
        assert total is not None
        return total / (len(self.scales) * (1 + self.flip))


def logits_of(output: Any) -> Tensor:
    """A network's logits ``[N, C, *size]``, from what it returns: themselves, or as in `sliding_window`."""
    logits = output["out"] if isinstance(output, dict) and "out" in output else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim < 3 or logits.shape[1] < 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"model: expected logits [N, classes, *size] of at least 2 classes, got {found}")
    return logits


class _Band:
    """The weighted sums of the logits of the image rows that one row of tiles covers, from the rows not yet done on."""

    def __init__(
        self, logits: Tensor, size: tuple[int, ...], output: tuple[int, ...], starts: list[list[int]],
        weights: list[Tensor],
    ) -> None:  # fmt: skip
        self.resampling = None if output == size else _Resampling(size, output)
        self.weights = [weight.to(logits.device) for weight in weights]
        self.window = _outer(self.weights)
        self.sums = self.window.new_zeros((logits.shape[1], len(weights[0]), *size[1:]))
        # What the weights of all tiles over a pixel add up to is a product, too, as the tiles lie on a grid.
        self.totals = [
            _total(extent, axis_starts, weight)
            for extent, axis_starts, weight in zip(size, starts, self.weights, strict=True)
        ]

    def add(self, corner: Sequence[int], logits: Tensor) -> None:
        """Add the logits ``[C, *tile]`` of the tile that begins there on the axes after the first."""
        columns = (slice(start, start + extent) for start, extent in zip(corner, logits.shape[2:], strict=True))
        at = (slice(None), slice(None), *columns)
        self.sums[at].addcmul_(logits.to(self.sums.dtype), self.window)

    def finish(self, first: int, end: int, with_confidence: bool) -> Iterator[tuple[Tensor, ...]]:
        """Labels, and confidence where asked, of image rows ``[first, end)``, which the sums begin with.

        They come in pieces. Of another size they are those of the rows that these, and the row before, resample to.
        """
        done = self.sums[:, : end - first]
        if with_confidence or self.resampling is not None:
            done /= _outer([self.totals[0][first:end], *self.totals[1:]])
        if self.resampling is not None:
            yield from self.resampling.predict(done, first, with_confidence)
        else:
            flat = done.flatten(2)[None]  # [1, C, rows, pixels of a row]
            parts = _predict(flat, tuple(flat.shape[2:]), with_confidence)
            yield tuple(part[0].view(done.shape[1:]) for part in parts)
        self._advance(end - first)

    def _advance(self, rows: int) -> None:
        """Move the sums so many rows up, piece by piece: where they go mustn't overlap where they come from."""
        kept = self.sums.shape[1] - rows
        for start in range(0, kept, rows):
            end = min(start + rows, kept)
            self.sums[:, start:end] = self.sums[:, start + rows : end + rows]
        self.sums[:, max(kept, 0) :] = 0


class _Resampling:
    """Predictions of another size than the logits', which come a few rows at a time."""

    def __init__(self, size: tuple[int, ...], output: tuple[int, ...]) -> None:
        _, mode = MODES[len(size)]
        self.blends = iter(blends_of(size[0], output[0], upsampling_between(size, output, mode, False)))
        self.blend = next(self.blends, None)  # of the next row to be made
        self.output = output
        self.before: Tensor | None = None  # the last row that came

    def predict(self, rows: Tensor, first: int, with_confidence: bool) -> Iterator[tuple[Tensor, ...]]:
        """Labels, and confidence where asked, of each row that rows ``[C, rows, ...]`` from ``first`` on complete."""

        def row(number: int) -> Tensor:
            if number >= first:
                return rows[:, number - first]
            assert self.before is not None
            return self.before

        while self.blend is not None and self.blend.second < first + rows.shape[1]:
            near, far = self.blend.weights
            blended = (row(self.blend.first) * near).add_(row(self.blend.second), alpha=far)
            plane, size = blended[None], self.output[1:]
            if len(size) == 1:  # a row of an image
                plane, size = plane.unsqueeze(2), (1, *size)
            yield tuple(part.view(1, *self.output[1:]) for part in _predict(plane, size, with_confidence))
            self.blend = next(self.blends, None)
        self.before = rows[:, -1].clone()


def _predict(logits: Tensor, size: tuple[int, ...], with_confidence: bool) -> tuple[Tensor, ...]:
    result = functional.upsample_argmax(logits, size, return_confidence=with_confidence)
    return result if isinstance(result, tuple) else (result,)


def _output_size(size: Sequence[int], extents: tuple[int, ...]) -> tuple[int, ...]:
    output = tuple(size)
    if len(output) != len(extents) or min(output) < 1:
        raise ValueError(f"size: expected {len(extents)} numbers above 0, got {output}")
    return output


def _sides(image: Tensor, tile: int | Sequence[int]) -> list[int]:
    if image.ndim not in (3, 4) or 0 in image.shape:
        raise ValueError(f"image: expected [channels, H, W] or [channels, D, H, W], got {list(image.shape)}")
    sides = [tile] * (image.ndim - 1) if isinstance(tile, int) else list(tile)
    if len(sides) != image.ndim - 1 or min(sides) < 1:
        raise ValueError(f"tile: expected one number or {image.ndim - 1}, all of them positive, got {tile}")
    return sides


def _starts(extent: int, side: int, overlap: float) -> list[int]:
    """Where the tiles begin along an axis: evenly, but for the last, which ends with the image."""
    step = max(side - math.ceil(side * overlap), 1)
    return [*range(0, extent - side, step), max(extent - side, 0)]


def _weights(side: int, blend: Blend) -> Tensor:
    """A tile's weights along an axis, float32."""
    if blend == "constant":
        return torch.ones(side)
    offsets = torch.arange(side) - (side - 1) / 2
    return torch.exp(-0.5 * (offsets / (GAUSSIAN_SIGMA * side)) ** 2)


def _outer(weights: Sequence[Tensor]) -> Tensor:
    """The product of one axis' numbers each, for every position of a box."""
    box = weights[0]
    for weight in weights[1:]:
        box = box[..., None] * weight
    return box


def _total(extent: int, starts: Sequence[int], weight: Tensor) -> Tensor:
    """The sum of the weights of all tiles over each position of an axis."""
    total = weight.new_zeros(extent)
    for start in starts:
        total[start : start + len(weight)] += weight
    return total


def _batches(corners: Iterator[tuple[int, ...]], batch_size: int) -> Iterator[list[tuple[int, ...]]]:
    while batch := list(itertools.islice(corners, batch_size)):
        yield batch


def _crop(image: Tensor, corner: Sequence[int], sides: Sequence[int]) -> Tensor:
    at = (slice(None), *(slice(start, start + side) for start, side in zip(corner, sides, strict=True)))
    return image[at]


def _logits(model: Callable[[Tensor], Any], tiles: Tensor, sides: Sequence[int], size: tuple[int, ...]) -> Tensor:
    """The network's logits of a batch of tiles, in their size; the tiles are padded to ``sides`` for it."""
    missing = [(0, side - extent) for side, extent in zip(sides, size, strict=True)]
    output = model(F.pad(tiles, [number for pair in reversed(missing) for number in pair]))
    logits = logits_of(output)
    if logits.ndim != tiles.ndim:
        raise ValueError(f"model: expected logits of {tiles.ndim} dimensions, as its input, got {list(logits.shape)}")
    if tuple(logits.shape[2:]) != tuple(sides):
        _, mode = MODES[len(sides)]
        logits = F.interpolate(logits, size=tuple(sides), mode=mode, align_corners=False)
    inside = (slice(None), slice(None), *(slice(extent) for extent in size))
    return logits[inside]
