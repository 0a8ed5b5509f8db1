"""The drop-in layers: torch's constructors, state_dict and repr, conversion both ways."""

import pytest
import torch
from torch import nn

import fastseg
from fastseg import reference
from fastseg.testing import assert_parity, make

CONVOLUTIONS = {
    "default": ((3, 8, 3), {}),
    "stem": ((3, 8, 7), {"stride": 2, "padding": 3, "bias": False}),
    "same-dilated": ((4, 8, 3), {"padding": "same", "dilation": 2, "groups": 2}),
    "reflect": ((3, 8, 3), {"padding": 1, "padding_mode": "reflect"}),
    "circular": ((3, 8, (3, 5)), {"padding": (1, 2), "padding_mode": "circular"}),
}
POOLS = {
    "2x2": ((2,), {}),
    "3x3-stride-2": ((3,), {"stride": 2, "padding": 1}),
    "ceil-indices": ((2,), {"ceil_mode": True, "return_indices": True}),
}


@pytest.mark.parametrize(("args", "options"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize(("pool_args", "pool_options"), POOLS.values(), ids=POOLS)
def test_from_torch_and_back(args: tuple, options: dict, pool_args: tuple, pool_options: dict) -> None:
    conv, pool = nn.Conv2d(*args, **options), nn.MaxPool2d(*pool_args, **pool_options)
    layer = fastseg.ConvReLUPool2d.from_torch(conv, pool)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias
    again = layer.to_torch()
    assert again[0].weight is conv.weight
    assert repr(again[2]) == repr(pool)

    input = make((2, args[0], 15, 18))

    def results(module: nn.Module) -> list[torch.Tensor]:
        output = module(input.to(next(module.parameters()).dtype))
        return [o.detach() for o in (output if isinstance(output, tuple) else (output,))]

    actual, plain = results(layer), results(nn.Sequential(conv, nn.ReLU(), pool))
    torch.testing.assert_close(results(again), plain, rtol=0, atol=0)
    truth = results(nn.Sequential(conv, nn.ReLU(), pool).double())
    assert_parity(actual, plain, truth, terms=conv.weight[0].numel())


def test_state_dict_is_that_of_conv2d() -> None:
    conv = nn.Conv2d(3, 8, 3)
    layer = fastseg.ConvReLUPool2d(3, 8, 3)
    layer.load_state_dict(conv.state_dict())
    conv.load_state_dict(layer.state_dict())
    torch.testing.assert_close(dict(layer.named_parameters()), dict(conv.named_parameters()), rtol=0, atol=0)


def test_same_initialisation_as_conv2d() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(3, 8, 3)
    torch.manual_seed(3)
    layer = fastseg.ConvReLUPool2d(3, 8, 3)
    assert torch.equal(conv.weight, layer.weight)
    assert torch.equal(conv.bias, layer.bias)


def test_outputs_in_order() -> None:
    layer = fastseg.ConvReLUPool2d(3, 8, 3, return_indices=True, return_skip=True)
    output, indices, skip = layer(make((1, 3, 10, 10)))
    assert indices.dtype == torch.int64
    assert torch.equal(skip.flatten(2).gather(2, indices.flatten(2)), output.flatten(2))


def test_unsupported_is_refused() -> None:
    conv = nn.Conv2d(3, 8, 3)
    with pytest.raises(ValueError, match="dilation"):
        fastseg.ConvReLUPool2d.from_torch(conv, nn.MaxPool2d(2, dilation=2))
    with pytest.raises(ValueError, match="return_skip"):
        fastseg.ConvReLUPool2d(3, 8, 3, return_skip=True).to_torch()


def test_repr_names_what_differs() -> None:
    text = repr(fastseg.ConvReLUPool2d(3, 8, 3, pool_size=3, pool_stride=2, pool_padding=1, return_skip=True))
    for part in ("3, 8, kernel_size=(3, 3)", "pool_size=3", "pool_stride=2", "pool_padding=1", "return_skip=True"):
        assert part in text


def test_cross_entropy_loss_takes_torchs_arguments() -> None:
    options = {"weight": torch.rand(5), "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.1}
    logits, target = make((2, 5, 6, 7)), torch.randint(5, (2, 6, 7))
    fused, plain = fastseg.CrossEntropyLoss(**options), nn.CrossEntropyLoss(**options)
    assert fused.state_dict().keys() == plain.state_dict().keys()
    truth = reference.cross_entropy(logits.double(), target, **options)
    assert_parity(fused(logits, target), plain(logits, target), truth, terms=target.numel())
