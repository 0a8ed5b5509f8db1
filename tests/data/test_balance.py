import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from fastseg.data import class_frequencies, class_weights

IGNORE = 255


def test_frequencies_count_pixels_and_the_images_of_each_class() -> None:
    pixels, present = class_frequencies([{0: 3, 1: 2, IGNORE: 1}, {1: 2}, {IGNORE: 2}], 3, IGNORE)
    assert pixels.dtype == present.dtype == torch.int64
    assert pixels.tolist() == [3, 4, 0]
    assert present.tolist() == [5, 7, 0]  # ignored pixels count nowhere


def test_an_ignored_class_is_not_counted() -> None:
    pixels, present = class_frequencies([{0: 1, 1: 2, 2: 1}], 3, ignore_index=1)
    assert pixels.tolist() == [1, 0, 1]
    assert present.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("method", "pixels", "present", "expected"),
    [
        # total / (C * pixels): 12 / (3 * 6), 12 / (3 * 4), 12 / (3 * 2)
        pytest.param("inverse", [6, 4, 2], [12, 12, 12], [2 / 3, 1.0, 2.0], id="inverse"),
        pytest.param("inverse", [6, 0, 2], [8, 0, 8], [8 / 18, 0.0, 8 / 6], id="inverse-with-an-absent-class"),
        # frequencies 1/2, 1/4, 1/8: median 1/4
        pytest.param("median", [8, 4, 1], [16, 16, 8], [0.5, 1.0, 2.0], id="median"),
        # of 1/2 and 1/8 the median is 5/16; the absent class has no part in it
        pytest.param("median", [8, 0, 1], [16, 0, 8], [0.625, 0.0, 2.5], id="median-with-an-absent-class"),
    ],
)
def test_weights_follow_the_formula(method: str, pixels: list[int], present: list[int], expected: list[float]) -> None:
    weights = class_weights(torch.tensor(pixels), torch.tensor(present), method)
    assert weights.dtype == torch.float32
    # computed in float64 and rounded once
    assert torch.equal(weights, torch.tensor(expected, dtype=torch.float64).to(torch.float32))


@pytest.mark.parametrize("method", ["inverse", "median"])
def test_equal_classes_weigh_one_however_many_pixels(method: str) -> None:
    pixels = torch.full((4,), 2**40 + 1)
    assert class_weights(pixels, 2 * pixels, method).tolist() == [1.0] * 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="method must be 'inverse' or 'median', but it is 'mean'"):
        class_weights(torch.tensor([1]), torch.tensor([1]), "mean")
    with pytest.raises(ValueError, match="pixels must count at least one pixel"):
        class_weights(torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), "inverse")
