"""What holds for every operator's results: memory, threads, strides, empty batches, graphs, derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastseg import _native
from fastseg.testing import assert_parity, make, values_and_gradients
from tests.kernels.poison import fresh_memory_of_nan
from tests.ops.operators import CALLS, Call, Size, assert_call_parity, each_call, each_gradient, kernels_for_small_calls

pytestmark = kernels_for_small_calls

LARGE = (97, 130)  # several tiles, bands of rows and tasks of each kernel

each_layout = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


def results_of(call: Call, tensors: list[Tensor]) -> list[Tensor]:
    return values_and_gradients(call.fused, tensors)


# ---- memory ----


@each_call
@each_layout
@pytest.mark.parametrize("size", [(12, 14), (13, 17)], ids=str)
def test_fresh_memory_filled_with_nan_changes_nothing(isa: str, size: Size, layout: str, call: Call) -> None:
    tensors = call.tensors(size=size, layout=layout)
    expected = results_of(call, tensors)
    with fresh_memory_of_nan():
        poisoned = results_of(call, tensors)
    torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


@each_call
def test_arguments_are_left_alone(isa: str, call: Call) -> None:
    tensors = call.tensors()
    before = [tensor.detach().clone() for tensor in tensors]
    outputs = [output for output in call.outputs(*tensors) if output.requires_grad]
    if outputs:
        torch.stack([output.square().sum() for output in outputs]).sum().backward()
    torch.testing.assert_close([tensor.detach() for tensor in tensors], before, rtol=0, atol=0)


# ---- threads, and the same bits ----


@pytest.mark.skipif(_native.INTERPRETED, reason="Triton's interpreter runs programs one after the other")
@each_call
@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bitwise_equal_for_any_number_of_threads_and_twice(
    isa: str, dtype: torch.dtype, layout: str, call: Call, threads: Callable[[int], None]
) -> None:
    tensors = call.tensors(3, LARGE, dtype, layout)  # float64: float32's terms, added in float64, hide their order
    results = []
    for count in (3, 3) if call.library else (1, 2, 3):
        threads(count)
        results.append(results_of(call, tensors))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


# ---- strides ----

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced-batch": lambda t: t[::2],
    "sliced-columns": lambda t: t[..., 1:-2],
    "strided": lambda t: t[:, :, ::2, ::2],
    "flipped-axes": lambda t: t.transpose(2, 3),
    "expanded": lambda t: t[:1].expand(3, *t.shape[1:]),
    "permuted": lambda t: t.transpose(0, 2).transpose(2, -1),
}


@each_call
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_input(isa: str, dtype: torch.dtype, view: Callable[[Tensor], Tensor], call: Call) -> None:
    base = call.tensors(6, (8, 10) if _native.INTERPRETED else (18, 22), dtype)[0]
    seen = view(base)
    others = call.tensors(seen.shape[0], tuple(seen.shape[2:]), dtype)[1:]
    assert_call_parity(call, [base, *others], view)


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda output: torch.ones((), dtype=output.dtype).expand_as(output),
    "transposed": lambda output: make(output.shape, output.dtype).transpose(-1, 1).contiguous().transpose(-1, 1),
    "from-cat": lambda output: make((output.shape[0], 2 * output.shape[1], *output.shape[2:]))[:, output.shape[1] :],
    "channels-last": lambda output: make(output.shape, output.dtype).movedim(1, -1).contiguous().movedim(-1, 1),
}


@each_gradient
@pytest.mark.parametrize("incoming", INCOMING.values(), ids=INCOMING)
def test_incoming_gradient_of_any_strides(isa: str, incoming: Callable[[Tensor], Tensor], call: Call) -> None:
    tensors = call.tensors()

    def gradients(function: Callable[..., object], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() if t.requires_grad else t for t in tensors]
        results = function(*leaves)
        outputs = [t for t in (results if isinstance(results, tuple) else (results,)) if t.requires_grad]
        given = [incoming(output.detach().float()).to(dtype) if output.ndim > 1 else None for output in outputs]
        return list(torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf.requires_grad], given))

    assert_parity(
        gradients(call.fused, torch.float32),
        gradients(call.plain, torch.float32),
        gradients(call.plain, torch.float64),
        terms=call.terms(tensors),
    )


@each_gradient
@each_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_keeps_the_layout(dtype: torch.dtype, layout: str, call: Call) -> None:
    tensors = call.tensors(dtype=dtype, layout=layout)
    gradient = torch.autograd.grad([t.sum() for t in call.outputs(*tensors) if t.requires_grad], tensors[0])[0]
    assert (gradient.dtype, gradient.stride()) == (dtype, tensors[0].stride())


# ---- no images ----


@each_call
def test_no_images(implementation: str, call: Call) -> None:
    assert_call_parity(call, call.tensors(0))


# ---- graphs ----


@each_gradient
def test_graph_can_be_retained_and_arguments_be_shared(call: Call) -> None:
    tensors = call.tensors()
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def total() -> Tensor:
        return torch.stack([output.sum() for output in call.outputs(*tensors) if output.requires_grad]).sum()

    loss = total()
    once = torch.autograd.grad(loss, wanted, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), once, rtol=0, atol=0)
    both = torch.autograd.grad(total() + total(), wanted)
    torch.testing.assert_close(both, tuple(2 * gradient for gradient in once))


@each_gradient
def test_changed_arguments_are_noticed(call: Call) -> None:
    leaf, *others = call.tensors()
    input = leaf * 1
    outputs = call.outputs(input, *others)
    input += 1
    if call.operator == "relu_pool2d":  # which doesn't look at it again
        return
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(outputs[0].sum(), leaf)


@each_gradient
def test_some_gradients(call: Call) -> None:
    """Whichever tensors need one, they are the same."""
    tensors = call.tensors()
    which = [at for at, tensor in enumerate(tensors) if tensor.requires_grad]
    whole = results_of(call, tensors)[-len(which) :]
    for at, expected in zip(which, whole, strict=True):
        alone = (
            [tensor.detach().requires_grad_(at == other) for other, tensor in enumerate(tensors)]
            if len(which) > 1
            else tensors
        )
        torch.testing.assert_close(results_of(call, alone)[-1], expected)


def test_predictions_have_no_gradient() -> None:
    for call in CALLS.values():
        if not call.is_differentiable:
            input, *others = call.tensors()
            assert not any(output.requires_grad for output in call.outputs(input.requires_grad_(), *others))


# ---- derivatives ----


@each_gradient
def test_gradcheck_to_second_order(call: Call) -> None:
    tensors = call.tensors(1, (6, 7), torch.float64)

    def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(output for output in call.outputs(*tensors) if output.requires_grad)

    assert torch.autograd.gradcheck(differentiable, tensors, fast_mode=True)
    # The second derivative is plain PyTorch's, which adds up on a GPU in any order.
    varies = 0.0 if torch.get_default_device().type == "cpu" else 1e-12
    assert torch.autograd.gradgradcheck(differentiable, tensors, fast_mode=True, nondet_tol=varies)


@each_gradient
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_second_derivative_equals_plain(dtype: torch.dtype, call: Call) -> None:
    tensors = call.tensors(1, (4, 5), dtype)

    def penalty(function: Callable[..., object], dtype: torch.dtype) -> Tensor:
        leaf, *others = (t.detach().to(dtype) if t.is_floating_point() else t for t in tensors)
        results = function(leaf.requires_grad_(), *others)
        output = results[0] if isinstance(results, tuple) else results
        (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)[0]

    assert_parity(
        penalty(call.fused, dtype),
        penalty(call.plain, dtype),
        penalty(call.plain, torch.float64),
        terms=call.terms(tensors),
    )
