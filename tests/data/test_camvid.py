import os
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from fastseg.data import (
    CAMVID_CLASSES,
    CAMVID_IGNORE_INDEX,
    Augment,
    DataError,
    MaskDataset,
    class_frequencies,
    class_weights,
    find_layout,
    find_pairs,
)

CAMVID = Path(os.environ.get("FASTSEG_CAMVID") or Path(__file__).parents[3] / "shared" / "data" / "camvid")

pytestmark = pytest.mark.skipif(
    not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}; the environment variable FASTSEG_CAMVID names its folder"
)


@pytest.mark.parametrize(("split", "count"), [("train", 367), ("val", 101)])
def test_the_published_split_is_found(split: str, count: int) -> None:
    assert find_layout(CAMVID) == "camvid"
    assert len(find_pairs(CAMVID, split)) == count


def test_the_absent_test_split_is_named() -> None:
    if (CAMVID / "test").is_dir():
        pytest.skip("this copy of CamVid has a test split")
    with pytest.raises(DataError, match="the split 'test' needs test/ and testannot/; it holds"):
        find_pairs(CAMVID, "test")


def test_labels_are_the_eleven_classes_and_the_ignored_one() -> None:
    pairs = find_pairs(CAMVID, "val")[:8]
    dataset = MaskDataset(pairs, num_classes=len(CAMVID_CLASSES), ignore_index=CAMVID_IGNORE_INDEX)
    for image, mask in dataset:
        assert image.shape == (3, 360, 480)
        assert mask.shape == (360, 480)
        assert mask.max() <= CAMVID_IGNORE_INDEX


def test_real_images_resize_balance_and_augment() -> None:
    classes = len(CAMVID_CLASSES)
    dataset = MaskDataset(find_pairs(CAMVID, "train")[:8], (90, 120), classes, CAMVID_IGNORE_INDEX)
    labels = [Counter(mask.flatten().tolist()) for _, mask in dataset]
    weights = class_weights(*class_frequencies(labels, classes, CAMVID_IGNORE_INDEX), "median")
    assert weights[CAMVID_CLASSES.index("road")] < 1 < weights[CAMVID_CLASSES.index("pole")]
    images, masks = (torch.stack(items) for items in zip(*dataset, strict=True))
    torch.manual_seed(0)
    moved_images, moved_masks = Augment(rotation=10, ignore_index=CAMVID_IGNORE_INDEX)(images / 255, masks)
    assert moved_images.shape == images.shape
    assert set(moved_masks.unique().tolist()) <= set(masks.unique().tolist()) | {CAMVID_IGNORE_INDEX}
