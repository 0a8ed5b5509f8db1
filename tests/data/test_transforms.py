import pytest
import torch

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
from fastseg.data import IMAGENET_MEAN, IMAGENET_STD, Augment, Normalize

IGNORE = 255


HEIGHT, WIDTH = 8, 30  # far from square, and each pixel's number below 255 is a uint8 label


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that hold each pixel's column, row and the number one; masks that hold each pixel's number."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    image = torch.stack([columns / WIDTH, rows / HEIGHT, torch.ones(HEIGHT, WIDTH)])
    mask = (rows * WIDTH + columns).to(torch.uint8)
    return image.repeat(count, 1, 1, 1), mask.repeat(count, 1, 1)


@pytest.mark.parametrize(
    ("options", "dims"),
    [
        pytest.param({"hflip": 1.0}, (-1,), id="hflip"),
        pytest.param({"hflip": 0.0, "vflip": 1.0}, (-2,), id="vflip"),
        pytest.param({"hflip": 1.0, "vflip": 1.0}, (-2, -1), id="both"),
        pytest.param({"hflip": 0.0}, (), id="none"),
    ],
)
def test_certain_flips_are_exact(options: dict[str, float], dims: tuple[int, ...]) -> None:
    images, masks = batch()
    flipped_images, flipped_masks = Augment(**options)(images, masks)
    assert torch.equal(flipped_images, images.flip(dims))
    assert torch.equal(flipped_masks, masks.flip(dims))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.float64], ids=str)
def test_image_and_mask_move_together_and_keep_their_types(dtype: torch.dtype, image_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    images, masks = batch(16)
    images, masks = images.to(image_dtype), masks.to(dtype)
    moved_images, moved_masks = Augment(hflip=0.5, vflip=0.5, rotation=45, ignore_index=IGNORE)(images, masks)
    assert moved_images.dtype == image_dtype
    assert moved_masks.dtype == dtype
    assert moved_images.shape == images.shape
    assert moved_masks.shape == masks.shape
    # Bilinear sampling of the coordinates gives the point that a pixel came from; the mask must hold the nearest pixel.
    columns, rows, weight = moved_images.double().unbind(1)
    inside = (moved_masks != IGNORE) & (weight > 1 - 1e-6)  # 1e-6: four rounded weights; outside, some are missing
    assert inside.double().mean() > 0.3
    numbers = moved_masks.long()
    # the point's coordinates, of magnitude WIDTH, take about sixteen float32 roundings from the angle on
    half = 0.5 + 16 * WIDTH * torch.finfo(torch.float32).eps
    assert (columns * WIDTH - numbers % WIDTH)[inside].abs().max() <= half
    assert (rows * HEIGHT - numbers // WIDTH)[inside].abs().max() <= half


def test_a_rotation_ignores_what_comes_from_outside() -> None:
    torch.manual_seed(0)
    images, masks = torch.ones(8, 3, 32, 32), torch.full((8, 32, 32), 7, dtype=torch.uint8)
    moved_images, moved_masks = Augment(hflip=0, rotation=45, ignore_index=IGNORE)(images, masks)
    assert set(moved_masks.unique().tolist()) == {7, IGNORE}
    assert (moved_masks[:, 16, 16] == 7).all()
    outside = moved_masks == IGNORE
    # to nearest sampling, outside begins half a pixel beyond the edge; there bilinear sampling is at most one half
    assert (moved_images[:, 0][outside] <= 0.5 + 1e-5).all()
    assert (moved_images[:, 0][~outside] > 0.24).all()  # half in both directions at a corner


@pytest.mark.parametrize("ignore_index", [0, 11, 255, 300, -100])
def test_a_rotation_makes_no_new_label(ignore_index: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 20, 28)
    masks = torch.tensor([5, 65535])[torch.randint(2, (4, 20, 28))]  # labels of a 16-bit file
    _, moved = Augment(rotation=30, ignore_index=ignore_index)(images, masks)
    assert set(moved.unique().tolist()) == {5, 65535, ignore_index}


def test_the_angle_is_drawn_from_both_sides_within_the_rotation() -> None:
    # The upper end of a vertical line through the centre moves by half the height times the tangent of the angle.
    torch.manual_seed(0)
    size, limit = 65, 10.0
    masks = torch.zeros(64, size, size, dtype=torch.uint8)
    masks[:, :, size // 2] = 1
    _, moved = Augment(hflip=0, rotation=limit)(torch.rand(64, 3, size, size), masks)
    offset = (moved[:, 0] == 1).nonzero()[:, 1] - size // 2
    reach = size // 2 * torch.tan(torch.deg2rad(torch.tensor(limit))).item()
    assert offset.abs().max() <= reach + 1  # + 1: rounding to the nearest pixel at both ends
    assert offset.min() < -reach / 2
    assert offset.max() > reach / 2


def test_each_image_draws_its_own_transformation_reproducibly() -> None:
    images, masks = batch(1)
    images, masks = images.expand(16, -1, -1, -1), masks.expand(16, -1, -1)
    augment = Augment(rotation=20)
    torch.manual_seed(1)
    first = augment(images, masks)
    torch.manual_seed(1)
    second = augment(images, masks)
    third = augment(images, masks)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], third[0])
    assert len({image.numpy().tobytes() for image in first[0]}) == 16


def test_a_flip_happens_with_its_probability() -> None:
    torch.manual_seed(0)
    images = torch.zeros(400, 1, 1, 2)
    images[..., 0] = 1
    flipped, _ = Augment(hflip=0.25)(images, torch.zeros(400, 1, 2, dtype=torch.uint8))
    # binomial with p = 1/4: five standard deviations are 5 * sqrt(400 * 3/16) = 43
    assert abs(flipped[:, 0, 0, 1].sum().item() - 100) <= 43


def test_the_inputs_stay_unchanged() -> None:
    images, masks = batch()
    kept_images, kept_masks = images.clone(), masks.clone()
    Augment(hflip=1.0, rotation=20)(images, masks)
    assert torch.equal(images, kept_images)
    assert torch.equal(masks, kept_masks)


def test_an_empty_batch_passes() -> None:
    images, masks = Augment(rotation=20)(torch.rand(0, 3, 8, 8), torch.zeros(0, 8, 8, dtype=torch.uint8))
    assert images.shape == (0, 3, 8, 8)
    assert masks.shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"hflip": 1.5}, r"hflip must be in \[0, 1\], but it is 1.5", id="hflip"),
        pytest.param({"vflip": -0.1}, r"vflip must be in \[0, 1\], but it is -0.1", id="vflip"),
        pytest.param({"rotation": 181.0}, r"rotation must be in \[0, 180\], but it is 181.0", id="rotation"),
        pytest.param({"rotation": float("nan")}, r"rotation must be in \[0, 180\], but it is nan", id="nan"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augment(**options)


@pytest.mark.parametrize(
    ("images", "masks", "error", "message"),
    [
        pytest.param(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
            torch.zeros(1, 4, 4, dtype=torch.uint8),
            TypeError,
            "images must be floating point in 0..1, but they are torch.uint8",
            id="uint8-images",
        ),
        pytest.param(
            torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), TypeError, "masks must be integer", id="float-masks"
        ),
        pytest.param(
            torch.zeros(1, 3, 4, 4),
            torch.zeros(1, 4, 5, dtype=torch.uint8),
            ValueError,
            r"they are \(1, 3, 4, 4\) and \(1, 4, 5\)",
            id="sizes",
        ),
        pytest.param(
            torch.zeros(1, 3, 4, 4),
            torch.zeros(1, 4, 4, dtype=torch.int8),
            ValueError,
            "masks of torch.int8 can't hold ignore_index 255",
            id="ignore_index-does-not-fit",
        ),
    ],
)
def test_bad_batches_are_refused(
    images: torch.Tensor, masks: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Augment(rotation=10)(images, masks)


def test_normalize_uint8_and_float_agree_with_the_formula() -> None:
    pixels = torch.randint(256, (2, 3, 5, 7), dtype=torch.uint8)
    normalized = Normalize()(pixels)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    truth = (pixels.double() / 255 - mean) / std
    assert normalized.dtype == torch.float32
    # four float32 roundings of numbers up to 1, then the division by std >= 0.224
    bound = 4 * torch.finfo(torch.float32).eps / min(IMAGENET_STD)
    assert (normalized - truth).abs().max() <= bound
    assert torch.equal(Normalize()(pixels.float() / 255), normalized)
    assert torch.equal(Normalize()(pixels[0]), normalized[0])  # a single image


def test_normalize_moves_with_its_module_and_adds_nothing_to_the_state_dict() -> None:
    normalize = Normalize().to("meta")
    assert normalize.mean.device.type == "meta"
    assert normalize.std.device.type == "meta"
    assert Normalize().state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"mean": (0.5,)}, "the same length, but they have 1 and 3", id="lengths"),
        pytest.param({"std": (1.0, 0.0, 1.0)}, "std must be positive", id="zero-std"),
    ],
)
def test_normalize_refuses_bad_statistics(arguments: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalize(**arguments)


def test_normalize_refuses_bad_images() -> None:
    with pytest.raises(TypeError, match=r"uint8 or floating point, but they are torch\.int64"):
        Normalize()(torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 3, H, W\), but their shape is \(1, 4, 4\)"):
        Normalize()(torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match=r"must be \(\.\.\., 3, H, W\), but their shape is \(4, 4\)"):
        Normalize()(torch.zeros(4, 4))
