"""examples/camvid_fastseg.py: the same loss curve with the backend as without it."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import fastseg
from fastseg.data import CAMVID_CLASSES, CAMVID_IGNORE_INDEX
from fastseg.testing import make_labels
from tests.data.test_camvid import CAMVID
from tests.fusion.cases import operators
from tests.fusion.test_third_party_models import assert_alike_in_float64, pytestmark  # noqa: F401 - the marks are this file's, too

EXAMPLE = Path(__file__).parents[2] / "examples" / "camvid_fastseg.py"
STEPS, SIZE, BATCH_SIZE = 10, (64, 96), 2


@pytest.fixture(scope="module")
def example() -> ModuleType:
    if not EXAMPLE.exists():
        pytest.skip("examples/ is part of a checkout, not of the installed package")
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        pytest.skip("needs segmentation_models_pytorch: pip install '.[models]'")
    spec = importlib.util.spec_from_file_location("camvid_fastseg", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generated(example: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise, brighter in each class than in the one before."""
    for seed in itertools.count():
        masks = make_labels((BATCH_SIZE, *SIZE), len(CAMVID_CLASSES), seed=seed, ignore_index=CAMVID_IGNORE_INDEX)
        noise = torch.rand((BATCH_SIZE, 3, *SIZE), generator=torch.Generator().manual_seed(seed))
        yield (20 * masks[:, None] + 30 * noise).to(torch.uint8), masks.to(torch.uint8)


def real(example: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    if not CAMVID.is_dir():
        pytest.skip(f"CamVid is not at {CAMVID}; the environment variable FASTSEG_CAMVID names its folder")
    return example.camvid(str(CAMVID), SIZE, BATCH_SIZE)


@pytest.mark.parametrize("batches", [generated, real])
def test_the_loss_curve_is_plain_pytorchs(example: ModuleType, batches: Callable[..., Iterator]) -> None:
    made = []

    def fused(model: nn.Module) -> None:
        torch._dynamo.reset()
        made.append(model)
        model.compile(backend="fastseg", options={"inner": "eager"})

    def plain(model: nn.Module) -> None:
        pass

    curves = [
        {"losses": torch.tensor([*itertools.islice(example.train(batches(example), run, dtype), STEPS)]).double()}
        for run, dtype in ((fused, torch.float64), (plain, torch.float64), (plain, torch.float32))
    ]
    assert_alike_in_float64(nn.Module(), *curves)
    losses = curves[0]["losses"]
    assert losses[-1] < losses[0]
    assert operators(fastseg.report(made[0])) == ["conv2d"] * 7 + ["conv_relu_pool2d"] * 6


def test_the_script_prints_losses(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "camvid", lambda folder, size, batch_size: generated(example))
    monkeypatch.setattr("sys.argv", ["camvid_fastseg.py", "folder", "--plain", "--steps", "2"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 0", "step 1"]
