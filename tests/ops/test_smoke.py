"""Each operator once, forward and backward, against plain PyTorch in float64: what a GPU run begins with."""

import pytest
import torch

from fastseg._native import INTERPRETED
from tests.ops.operators import Call, assert_call_parity, each_call, kernels_for_small_calls

pytestmark = kernels_for_small_calls

HALF = torch.float16 if INTERPRETED else torch.bfloat16  # whose products Triton's interpreter computes wrongly


@each_call
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
def test_operator(dtype: torch.dtype, layout: str, call: Call) -> None:
    assert_call_parity(call, call.tensors(dtype=dtype, layout=layout))
