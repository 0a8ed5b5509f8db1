"""upsample_confusion_matrix: what it means, what it accepts, and the checks of its arguments."""

from __future__ import annotations

from torch import Tensor

from fastseg.functional._checks import check_grid, check_label_map, check_map
from fastseg.ops import upsample_confusion_matrix as operator
from fastseg.ops.upsampling import grid_between


def upsample_confusion_matrix(
    input: Tensor,
    target: Tensor,
    ignore_index: int | None = None,
    *,
    mode: str = "bilinear",
    align_corners: bool = False,
) -> Tensor:
    """The confusion matrix of the upsampled prediction, without the upsampled logits and without the prediction.

    With the prediction ``p = upsample_argmax(input, target.shape[1:], mode=mode, align_corners=align_corners)``:
    ``matrix[t, c] = |{target = t and p = c}|``. Matrices of batches, or of processes, add up to that of the whole set;
    `fastseg.metrics` turns them into scores. Not differentiable.

    Args:
        input: Logits ``[N, C, h, w]``, or of volumes ``[N, C, d, h, w]``; float32, float64, bfloat16 or float16, in any
            memory format.
        target: Labels ``[N, H, W]`` or ``[N, D, H, W]`` in [0, C), of any integer dtype.
        ignore_index: A label that isn't counted, be it one of the classes or not; None for no such label.
        mode: "bilinear", of volumes "trilinear", or "nearest".
        align_corners: As in `fastseg.functional.upsample_cross_entropy`.

    Returns:
        int64, ``[C, C]``: rows are the truth, columns the prediction.

    Raises:
        IndexError: On a CPU, a label is neither in [0, C) nor ignore_index. A GPU can't raise one without waiting for
            it, and makes all counts negative, which `fastseg.metrics.scores` refuses.
        ValueError: Shapes or devices don't fit; the message names the argument.
        TypeError: A dtype that isn't supported.
    """
    check_map(input, volumes=True)
    check_grid(mode, align_corners, input.ndim - 2)
    target = check_label_map(target, input, ignore_index)
    grid = grid_between(input.shape[2:], target.shape[1:], mode, align_corners)
    return operator.upsample_confusion_matrix(input, target, ignore_index, *grid)
