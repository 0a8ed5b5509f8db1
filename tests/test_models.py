"""The networks and their plain-PyTorch twins: same weights, same losses, gradients and predictions."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseg
from fastseg import functional, metrics, models, ops, reference
from fastseg.models.base import PixelClassifier
from fastseg.testing import assert_parity, make, make_labels, values_and_gradients

NETWORKS = {
    "fcn": (models.FCN, models.plain.FCN, {"widths": (8, 12)}),
    "fcn-5x5": (models.FCN, models.plain.FCN, {"widths": (8,), "kernel_size": 5, "in_channels": 1}),
    "unet": (models.UNet, models.plain.UNet, {"widths": (8, 12, 16)}),
    "unet-even-kernel": (models.UNet, models.plain.UNet, {"widths": (4, 8), "kernel_size": 2}),
}
CLASSES = 5


def twins(network: type, plain: type, options: dict) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = network(num_classes=CLASSES, **options)
    twin = plain(num_classes=CLASSES, **options)
    twin.load_state_dict(model.state_dict())
    return model, twin


def step(model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    images = images.to(next(model.parameters()).dtype)
    loss = model.loss(images, labels, ignore_index=255)
    confidence = model.predict(images, return_confidence=True)[1]
    return [loss.detach(), model(images).detach(), confidence, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("network", "plain", "options"), NETWORKS.values(), ids=NETWORKS)
def test_twins_agree(network: type, plain: type, options: dict, layout: str) -> None:
    model, twin = twins(network, plain, options)
    if layout == "channels_last":
        model, twin = (m.to(memory_format=torch.channels_last) for m in (model, twin))
    images = make((2, options.get("in_channels", 3), 21, 26), layout=layout)  # sizes that don't divide by the pools
    labels = make_labels((2, 21, 26), CLASSES, torch.uint8, ignore_index=255)
    truth = step(copy.deepcopy(twin).double(), images, labels)
    assert_parity(step(model, images, labels), step(twin, images, labels), truth, terms=labels.numel())
    assert model(images).shape == (2, CLASSES, 21, 26)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("size", [None, (40, 17)], ids=["the images' size", "another size"])
@pytest.mark.parametrize(("network", "plain", "options"), NETWORKS.values(), ids=NETWORKS)
def test_twins_predict_alike(network: type, plain: type, options: dict, size: tuple[int, int] | None) -> None:
    """Of classes whose logits differ by rounding alone, either is right: the predicted ones' true logits must agree."""
    model, twin = twins(network, plain, options)
    images = make((2, options.get("in_channels", 3), 21, 26))
    exact = copy.deepcopy(twin).double()
    logits = reference.upsample(exact.logits(images.double()).detach(), size or (21, 26), None, "bilinear", False)
    actual, expected = (
        logits.gather(1, network.predict(images, size).unsqueeze(1).long()).float() for network in (model, twin)
    )
    assert_parity(actual, expected, logits.amax(1, keepdim=True), terms=math.prod(images.shape[2:]))


@pytest.mark.parametrize(("network", "plain", "options"), NETWORKS.values(), ids=NETWORKS)
def test_twin_uses_no_fastseg_operator(
    network: type, plain: type, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, twin = twins(network, plain, options)
    for operator in ops.__all__:
        monkeypatch.setattr(torch.ops.fastseg, operator, None)
    images, labels = make((1, options.get("in_channels", 3), 16, 16)), make_labels((1, 16, 16), CLASSES)
    twin.loss(images, labels).backward()
    twin.predict(images)
    twin.upsample_confusion_matrix(twin.logits(images), labels)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 6, 7, 5), (1, 6, 1, 1), (0, 6, 3, 4)], ids=["batch", "one pixel", "empty"])
def test_classifier_is_a_convolution(shape: tuple[int, ...], layout: str) -> None:
    classifier = PixelClassifier(6, CLASSES)
    tensors = [make(shape, layout=layout, requires_grad=True), *classifier.parameters()]

    def classify(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(classifier, {"weight": weight, "bias": bias}, features)

    actual, plain = values_and_gradients(classify, tensors), values_and_gradients(F.conv2d, tensors)
    assert_parity(actual, plain, values_and_gradients(F.conv2d, tensors, torch.float64), terms=math.prod(shape))
    assert actual[0].stride() == plain[0].stride()


def test_predict() -> None:
    model = models.FCN(num_classes=CLASSES)
    images = make((2, 3, 16, 16))
    labels, confidence = model.predict(images, return_confidence=True)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, model.predict(images))
    assert torch.equal(labels, functional.upsample_argmax(model.logits(images), (16, 16)))
    assert confidence.shape == (2, 16, 16)
    assert not confidence.requires_grad
    assert models.FCN(num_classes=300, widths=(4,)).predict(images).dtype == torch.int64


@pytest.mark.parametrize(("network", "plain", "options"), NETWORKS.values(), ids=NETWORKS)
def test_confusion_matrix_is_that_of_the_prediction(network: type, plain: type, options: dict) -> None:
    model, _ = twins(network, plain, options)
    images = make((2, options.get("in_channels", 3), 21, 26))
    labels = make_labels((2, 21, 26), CLASSES, torch.uint8, ignore_index=255)
    actual = model.upsample_confusion_matrix(model.logits(images), labels, ignore_index=255)
    assert torch.equal(actual, metrics.confusion_matrix(model.predict(images), labels, CLASSES, ignore_index=255))


def largest_allocation(call: Callable[[], object]) -> int:
    """The most bytes that one of torch's operators allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return max(max(event.self_cpu_memory_usage, event.self_device_memory_usage) for event in profile.events())


@pytest.mark.parametrize("backend", ["fastseg", "plain"])
@pytest.mark.parametrize("use", ["loss", "predict", "confidence", "confusion matrix"])
def test_nothing_is_as_large_as_full_resolution_logits(use: str, backend: str) -> None:
    classes = 64  # full-resolution logits are 16 times the network's own, and larger than its other maps
    network = models.FCN if backend == "fastseg" else models.plain.FCN
    model = network(num_classes=classes, widths=(4, 4))
    images, labels = make((2, 3, 32, 32)), make_labels((2, 32, 32), classes, torch.uint8)
    calls = {
        "loss": lambda: model.loss(images, labels).backward(),
        "predict": lambda: model.predict(images),
        "confidence": lambda: model.predict(images, return_confidence=True),
        "confusion matrix": lambda: model.upsample_confusion_matrix(model.logits(images), labels),
    }
    full = 2 * classes * 32 * 32 * torch.float32.itemsize
    if backend == "fastseg":
        assert largest_allocation(calls[use]) < full / 4
    else:  # the measurement finds what is there
        assert largest_allocation(calls[use]) >= full


def test_compiled_model_gives_the_eager_loss_and_gradients() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    model = models.FCN(num_classes=CLASSES, widths=(4, 8))
    images, labels = make((2, 3, 16, 16)), make_labels((2, 16, 16), CLASSES)
    expected = torch.autograd.grad(model.loss(images, labels), list(model.parameters()))
    compiled = torch.compile(model.loss, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(images, labels), list(model.parameters()))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("network", [models.FCN, models.UNet])
def test_export_for_a_range_of_sizes(network: type) -> None:
    model = network(num_classes=CLASSES, widths=(4, 8))
    sizes = {2: torch.export.Dim("height", min=16, max=512), 3: torch.export.Dim("width", min=16, max=512)}
    exported = torch.export.export(model, (make((2, 3, 32, 40)),), dynamic_shapes={"input": sizes}).module()
    images = make((2, 3, 19, 26))
    torch.testing.assert_close(exported(images), model(images))


@pytest.mark.parametrize(("network", "error"), [(models.FCN, "at least one"), (models.UNet, "at least two")])
def test_too_few_widths(network: type, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        network(num_classes=2, widths=())


# ---- the classic tutorial: two conv-ReLU-pool blocks, flatten, linear, cross-entropy, Adam ----

TUTORIAL_CLASSES = 10
STEPS = 10


def tutorial(fused: bool) -> nn.Sequential:
    def block(before: int, after: int) -> list[nn.Module]:
        if fused:
            return [fastseg.ConvReLUPool2d(before, after, 3, padding=1)]
        return [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    torch.manual_seed(0)
    return nn.Sequential(*block(3, 32), *block(32, 64), nn.Flatten(), nn.Linear(64 * 56 * 56, TUTORIAL_CLASSES))


def train(model: nn.Module, loss_function: nn.Module, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses of each step, the first step's gradients, and the accuracy at the end."""
    images = make((2, 3, 224, 224), seed=1).to(dtype)
    labels = make_labels((2,), TUTORIAL_CLASSES, seed=2)
    model.to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    losses, gradients = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_function(model(images), labels)
        loss.backward()
        gradients = gradients or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), gradients, (model(images).argmax(1) == labels).double().mean()


def test_classic_tutorial_trains_alike() -> None:
    fused = train(tutorial(True), fastseg.CrossEntropyLoss(), torch.float32)
    plain = train(tutorial(False), nn.CrossEntropyLoss(), torch.float32)
    truth = train(tutorial(False), nn.CrossEntropyLoss(), torch.float64)
    # Over the steps, rounding errors grow in both trainings alike; 224 * 224 pixels lie behind a weight's gradient.
    assert_parity([fused[0], *fused[1]], [plain[0], *plain[1]], [truth[0], *truth[1]], terms=224 * 224)
    assert fused[2] == plain[2]
    assert fused[0][-1] < fused[0][0] / 2
