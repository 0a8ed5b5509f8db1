"""PyTorch's own samples for conv2d, each followed by ReLU and four kinds of pool, through conv_relu_pool2d."""

import pytest
import torch

pytest.importorskip("expecttest", reason="expecttest isn't installed: it comes with the extra [test]")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

from fastseg import functional, reference
from fastseg.testing import assert_parity, values_and_gradients

CONV2D = next(op for op in op_db if op.name == "nn.functional.conv2d")
POOLS = {
    "2x2": {},
    "3x3-stride-2": {"pool_size": 3, "pool_stride": 2, "pool_padding": 1},
    "ceil": {"pool_size": 2, "ceil_mode": True, "return_skip": True},
    "2x2-stride-1": {"pool_size": 2, "pool_stride": 1, "pool_padding": 1},
}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_samples(dtype: torch.dtype, pool: dict) -> None:
    samples = list(CONV2D.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    outcomes = [runs_alike(sample, pool) for sample in samples]
    assert any(outcomes)


def runs_alike(sample: SampleInput, pool: dict) -> bool:
    """Compares both; where plain PyTorch refuses a sample (its output is too small to pool), fastseg must too."""
    weight, bias = sample.args[0], sample.args[1] if len(sample.args) > 1 else None
    tensors, options = [sample.input, weight, bias], sample.kwargs | pool
    try:
        plain = values_and_gradients(reference.conv_relu_pool2d, tensors, **options)
    except RuntimeError:
        with pytest.raises((ValueError, TypeError)):
            functional.conv_relu_pool2d(*tensors, **options)
        return False
    truth = values_and_gradients(reference.conv_relu_pool2d, tensors, torch.float64, **options)
    actual = values_and_gradients(functional.conv_relu_pool2d, tensors, **options)
    assert_parity(actual, plain, truth, terms=max(sample.input.numel(), weight.numel()))
    return True
