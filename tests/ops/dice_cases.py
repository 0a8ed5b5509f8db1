"""What the tests of the Dice losses share: combinations of their options, and the comparison with plain PyTorch."""

from typing import Any

from torch import Tensor

from tests.ops import cross_entropy_cases, upsample_cases

# How the two losses are put together.
COMBINATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "nnunet": {"batch_dice": True, "include_background": False},
    "batch": {"batch_dice": True},
    "foreground": {"include_background": False},
    "no-smooth": {"smooth": 0.0},
    "smooth-1": {"smooth": 1.0, "batch_dice": True},
    "unequal": {"ce_weight": 0.3, "dice_weight": 2.0},
    "dice-alone": {"ce_weight": 0.0},
    "cross-entropy-alone": {"dice_weight": 0.0},
}


def check_dice(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    terms = cross_entropy_cases.terms_of(input)
    return cross_entropy_cases.check(input, target, weight, operator="cross_entropy_dice", terms=terms, **options)


def check_upsampled(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> list[Tensor]:
    terms = upsample_cases.terms_of(input, tuple(target.shape[1:]), options.get("mode", "bilinear"))
    return cross_entropy_cases.check(
        input, target, weight, operator="upsample_cross_entropy_dice", terms=terms, **options
    )
