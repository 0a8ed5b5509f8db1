"""upsample_threshold: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

from torch import Tensor

from fastseg.functional._checks import FloatOrPair, IntOrPair, check_grid, check_map, resolve_size
from fastseg.ops import upsample_threshold as operator
from fastseg.ops.upsampling import grid_between


def upsample_threshold(
    input: Tensor,
    size: IntOrPair | None = None,
    threshold: float = 0.5,
    *,
    scale_factor: FloatOrPair | None = None,
    mode: str = "bilinear",
    align_corners: bool = False,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Where the upsampled logits' sigmoid is above a threshold, without the upsampled logits: masks, one a class.

    Equals ``interpolate(input, size, scale_factor, mode, align_corners).sigmoid() > threshold``: the prediction of
    binary and of multilabel networks, and the masks of instances. The logits are compared with
    ``log(threshold / (1 - threshold))``, so that no sigmoid is rounded to the threshold, or to 0 or 1, before; nor are
    half and bfloat16 logits, which are interpolated in float32. NaN is outside of every mask. Not differentiable.

    Args:
        input: Logits ``[N, C, h, w]``; float32, float64, bfloat16 or float16, in any memory format.
        size: The output's (height, width), or one number for both. Either it or ``scale_factor``.
        threshold: A probability, in [0, 1]. Above 0 is every logit but minus infinity, above 1 none.
        scale_factor: As in `upsample_argmax`.
        mode: "bilinear" or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.
        return_scores: Also return each mask's score and box, from the same pass.

    Returns:
        Masks ``[N, C, H, W]`` of 0 and 1 in uint8; where asked also the scores ``[N, C]`` in input's dtype, the mean of
        the sigmoid inside each mask, and the boxes ``[N, C, 4]`` in int64: the first column and row with any pixel of
        the mask, and the first column and row beyond the last. For a mask without a pixel all of them are 0.

    Raises:
        ValueError: Shapes or numbers don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    check_map(input)
    check_grid(mode, align_corners)
    output, factors = resolve_size(input, size, scale_factor)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a probability in [0, 1], got {threshold}")
    grid = grid_between(input.shape[2:], output, mode, align_corners)
    masks, scores, boxes = operator.upsample_threshold(input, output, factors, threshold, *grid, return_scores)
    return (masks, scores, boxes) if return_scores else masks
