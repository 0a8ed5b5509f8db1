"""Which calls the fusion pass takes together, and which it leaves to PyTorch without a word."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg.fusion import trial
from fastseg.ops.convolution import algorithms
from fastseg.testing import make
from tests.fusion.back_end_cases import logits, loss_and_prediction
from tests.fusion.cases import compiled, operators

PLAIN_CONVOLUTIONS = {
    "few-channels": ((2, 4, 16, 16), {}),
    "few-pixels": ((1, 8, 9, 9), {}),
    "stride": ((2, 8, 32, 32), {"stride": 2}),
    "dilation": ((2, 8, 32, 32), {"dilation": 2}),
    "groups": ((2, 8, 32, 32), {"groups": 2}),
    "kernel": ((2, 8, 32, 32), {"kernel_size": 5}),
}


@pytest.mark.parametrize("name", PLAIN_CONVOLUTIONS)
def test_convolutions_without_a_pool_stay_unless_winograd_serves_them(name: str) -> None:
    """They are everywhere, and PyTorch's own serves them as well: no word of it."""
    shape, options = PLAIN_CONVOLUTIONS[name]
    model = nn.Sequential(nn.Conv2d(shape[1], 6, **{"kernel_size": 3} | options), nn.ReLU(inplace=True))
    x, fused = make(shape), compiled(model)
    assert torch.equal(fused(x), model(x))
    report = fastseg.report(fused)
    assert (len(report.graphs), report.replaced, report.left) == (1, [], [])


def test_a_convolution_without_a_pool_stays_on_other_devices() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.ReLU()).to("meta")
    fused = compiled(model)
    fused(torch.empty(2, 8, 32, 32, device="meta"))
    report = fastseg.report(fused)
    assert (len(report.graphs), report.replaced, report.left) == (1, [], [])


def test_a_small_convolution_alone_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight).sin()

    called = make((1, 8, 16, 17)), make((4, 8, 3, 3))
    for least, expected in ((16 * 17 * 8 * 4 * 9, ["conv2d"]), (16 * 17 * 8 * 4 * 9 + 1, [])):
        monkeypatch.setattr(algorithms, "CONV2D_MIN_PRODUCTS", least)
        fused = compiled(convolve)
        fused(*called)
        assert operators(fastseg.report(fused)) == expected


STATISTICS = make((8,), seed=4), make((8,), seed=5).abs() + 0.5


@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        ((2, 8, 64, 64), torch.float32, {}),
        ((2, 8, 64, 66), torch.bfloat16, {}),
        ((2, 8, 64 * 66), torch.float32, {}),
        ((2, 8, 64, 66), torch.float32, {"running_mean": STATISTICS[0], "running_var": STATISTICS[1]}),
    ],
    ids=["small", "bfloat16", "signal", "running"],
)
def test_instance_normalisation_that_stays(shape: tuple[int, ...], dtype: torch.dtype, options: dict) -> None:
    def normalise(x: Tensor) -> Tensor:
        return F.leaky_relu(F.instance_norm(x, **options, use_input_stats=not options))

    x, fused = make(shape, dtype, seed=1), compiled(normalise)
    assert torch.equal(fused(x), normalise(x))
    report = fastseg.report(fused)
    assert (report.replaced, report.left) == ([], [])


def test_instance_normalisation_of_dynamic_graphs() -> None:
    """Where TorchDynamo takes numbers for inputs, too."""
    model = nn.Sequential(nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.2), nn.InstanceNorm2d(8, eps=1e-3))
    fused = compiled(model, dynamic=True)
    for shape in ((2, 8, 64, 66), (1, 8, 90, 100), (1, 8, 9, 11)):
        torch.testing.assert_close(fused(make(shape)), model(make(shape)), rtol=1e-5, atol=1e-5)
    assert operators(fastseg.report(fused)) == ["instance_norm", "instance_norm"]


def test_an_active_dropout_stays_before_the_relu() -> None:
    fused = compiled(lambda x: F.leaky_relu(F.dropout(F.instance_norm(x), 0.5, training=True)))
    fused(make((2, 8, 64, 66)))
    assert [replaced.pattern for replaced in fastseg.report(fused).replaced] == ["instance_norm"]


def test_a_pad_of_something_stays() -> None:
    fused = compiled(lambda x: F.pad(x, (0, 0, 0, 1)))
    fused(make((2, 8, 6, 6)))
    assert fastseg.report(fused).replaced == []


def test_a_place_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution with its pool, and not with its ReLU and alone as well; nor are calls that two places share."""
    tried: list[str] = []
    monkeypatch.setattr(trial, "obstacle", lambda match: tried.append(match.function.__name__))
    compiled(nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.MaxPool2d(2)))(make((2, 8, 32, 32)))
    assert tried == ["conv_batch_norm_relu_pool2d"]
    tried.clear()
    compiled(loss_and_prediction)(*logits(torch.float32, "nchw"))
    assert tried == ["interpolate_cross_entropy", "interpolate_argmax"]


def test_a_hook_sees_what_it_saw() -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    fused, x = compiled(model), torch.randn(1, 3, 8, 8)
    fused(x)
    model(x)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert operators(fastseg.report(fused)) == ["relu_pool2d"]


@pytest.mark.parametrize("training", [True, False], ids=["step", "prediction"])
@pytest.mark.parametrize(("size", "idle"), [(12, True), (13, False)])
def test_taps_that_see_nothing_but_padding(size: int, idle: bool, training: bool) -> None:
    """A step leaves them out by conv2d, on maps so small that there are any; predictions have weights kept for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 96, 3, dilation=12, padding=12, bias=False), nn.BatchNorm2d(96)).train(training)
    x, fused = make((2, 64, size, size)), compiled(model)
    with torch.set_grad_enabled(training):
        fused(x)
        with torch.profiler.profile() as profile:
            found = fused(x)
        torch.testing.assert_close(found, model(x))
    called = [event.name for event in profile.events() if event.name.startswith("fastseg::")]
    assert called == ([] if training and not idle else ["fastseg::conv2d" if training else "fastseg::conv2d_packed"])
