"""PyTorch's own samples for nn.functional.cross_entropy."""

import pytest
import torch

pytest.importorskip("expecttest", reason="expecttest isn't installed: it comes with the extra [test]")
from torch.testing._internal.common_methods_invocations import op_db

from fastseg import functional, reference
from fastseg.ops import cross_entropy as operator
from fastseg.testing import assert_parity, values_and_gradients

CROSS_ENTROPY = next(op for op in op_db if op.name == "nn.functional.cross_entropy")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("largest_plain", [0, operator.PLAIN_MAX_LOGITS], ids=["kernel", "plain"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_samples(dtype: torch.dtype, largest_plain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "PLAIN_MAX_LOGITS", largest_plain)
    samples = list(CROSS_ENTROPY.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for sample in samples:
        options = dict(sample.kwargs)
        tensors = [sample.input, sample.args[0], options.pop("weight", None)]
        assert_parity(
            values_and_gradients(functional.cross_entropy, tensors, **options),
            values_and_gradients(reference.cross_entropy, tensors, **options),
            values_and_gradients(reference.cross_entropy, tensors, torch.float64, **options),
            # In float64 plain PyTorch is its own truth, and rounds as much.
            terms=sample.input.numel() ** 2 if dtype == torch.float64 else sample.input.numel(),
        )
