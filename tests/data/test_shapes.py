from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from fastseg.data import MaskDataset, ShapesDataset, class_frequencies, find_pairs

COUNT = 40


@pytest.fixture(scope="module")
def items() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(ShapesDataset(COUNT))


def test_items_have_the_types_of_files(items: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert len(items) == COUNT
    for image, mask in items:
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (3, 96, 96)
        assert mask.shape == (96, 96)
        assert image.is_contiguous()


def test_an_item_depends_on_seed_and_index_alone(items: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    torch.manual_seed(1)  # the generator of others plays no part
    image, mask = ShapesDataset(100)[7]
    assert torch.equal(image, items[7][0])
    assert torch.equal(mask, items[7][1])
    assert not torch.equal(ShapesDataset(COUNT, seed=1)[7][0], image)
    assert len({image.numpy().tobytes() for image, _ in items}) == COUNT


def test_every_class_covers_a_good_part_of_the_ground(items: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    labels = [Counter(mask.flatten().tolist()) for _, mask in items]
    pixels, _ = class_frequencies(labels, len(ShapesDataset.CLASSES), 255)
    shares = pixels / pixels.sum()
    assert shares[0] > 0.5
    assert shares[1:].min() > 0.05


def test_colours_alone_do_not_tell_the_classes_apart(items: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    # The best guess from a pixel's colour in 8^3 steps, measured on the very pixels that it is made from, is an upper
    # bound for whatever looks at single pixels.
    colors = torch.stack([image for image, _ in items]).transpose(0, 1).flatten(1).long() // 32
    masks = torch.stack([mask for _, mask in items]).flatten().long()
    cells = (colors[0] * 8 + colors[1]) * 8 + colors[2]
    counts = torch.bincount(cells * 4 + masks, minlength=8**3 * 4).view(-1, 4)
    best_guess = counts.max(dim=1).values.sum() / counts.sum()
    assert best_guess < 0.85  # a two-stage FCN passes 0.95 within 100 steps


@pytest.mark.parametrize("size", [(1, 1), (7, 64), (65, 30)], ids=str)
def test_sizes_may_be_odd(size: tuple[int, int]) -> None:
    image, mask = ShapesDataset(1, size=size)[0]
    assert image.shape == (3, *size)
    assert mask.shape == size


def test_written_files_read_back_as_the_same_items(tmp_path: Path) -> None:
    dataset = ShapesDataset(5, size=(16, 24))
    dataset.write(tmp_path / "shapes")
    pairs = find_pairs(tmp_path / "shapes", "train", val_fraction=0)
    read = MaskDataset(pairs, num_classes=len(ShapesDataset.CLASSES))
    for (image, mask), (read_image, read_mask) in zip(dataset, read, strict=True):
        assert torch.equal(image, read_image)
        assert torch.equal(mask, read_mask)


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_outside_the_length_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=rf"index must be in \[0, 3\), but it is {index}"):
        ShapesDataset(3)[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"length": -1}, "length must not be negative, but it is -1", id="length"),
        pytest.param({"length": 1, "seed": -1}, "seed must not be negative, but it is -1", id="seed"),
        pytest.param({"length": 1, "size": (0, 4)}, r"size must be two positive numbers.*\(0, 4\)", id="size"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapesDataset(**arguments)
