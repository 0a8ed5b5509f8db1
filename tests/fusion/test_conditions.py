"""Calls that look like a pattern and must stay as they are: each with its reason, and not a bit different."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastseg
from tests.fusion import back_end_conditions, front_end_conditions
from tests.fusion.back_end_cases import logits, mask_logits
from tests.fusion.cases import compiled, operators

LEFT = {**front_end_conditions.LEFT, **back_end_conditions.LEFT}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:size_average")
def test_left_as_it_is(name: str) -> None:
    function, tensors, reason, replaced = LEFT[name]
    given = tensors(torch.float32, "nchw")
    fused = compiled(function, fullgraph=True)
    actual, plain = (outcome(f, given) for f in (fused, function))
    report = fastseg.report(fused)
    assert operators(report) == list(replaced)
    (pattern, *_) = (leftover.pattern for leftover in report.left if reason in leftover.reason)
    assert ("interpolate" in pattern) == (tensors in (logits, mask_logits)), report
    assert replaced or "the model runs as it was" in report.summary()
    for a, p in zip(actual, plain, strict=True):
        torch.testing.assert_close(a, p, rtol=0, atol=0)


def outcome(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    results = function(*leaves)
    outputs = list(results) if isinstance(results, tuple) else [results]
    total = sum((o.sum() for o in outputs if o.requires_grad), torch.zeros(()))
    if total.requires_grad:
        total.backward()
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def test_logits_used_elsewhere_are_upsampled_but_the_loss_is_fused() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        up = F.interpolate(x, target.shape[-2:], mode="bilinear")
        return F.cross_entropy(up, target, weight, ignore_index=255), up

    fused = compiled(function, fullgraph=True)
    fused(*logits(torch.float32, "nchw"))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert [leftover.reason for leftover in report.left] == ["interpolate (up) has another user: the graph's output"]


def test_changes_in_place_elsewhere_do_not_matter() -> None:
    """Before, after, and between of values that the replaced calls don't read."""

    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        scaled = (x * 2).mul_(0.5)
        counter = target.clone()
        up = F.interpolate(scaled, (24, 32), mode="bilinear")
        counter.add_(1)
        other = F.dropout(F.relu(scaled.neg(), inplace=True), 0.0, True, True)
        loss = F.cross_entropy(up, target, ignore_index=255)
        loss += other.mean()
        return loss + counter.sum()

    fused, given = compiled(function, fullgraph=True), logits(torch.float32, "nchw")
    torch.testing.assert_close(fused(*given), function(*given))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["upsample_cross_entropy"]
    assert not report.left


def test_a_scale_factor_with_another_grid() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        up = F.interpolate(x, scale_factor=1.7, mode="bilinear")
        return F.cross_entropy(up, target[:, :10, :13], ignore_index=255)

    fused, given = compiled(function, fullgraph=True), logits(torch.float32, "nchw")
    torch.testing.assert_close(fused(*given), function(*given))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert "isn't that of the size" in report.left[0].reason


def test_probabilities_are_no_labels() -> None:
    def function(x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.interpolate(x, (12, 16)), F.interpolate(x.detach(), (12, 16)).softmax(1))

    fused = compiled(function, fullgraph=True)
    fused(*logits(torch.float32, "nchw"))
    report = fastseg.report(fused)
    assert [r.operator for r in report.replaced] == ["cross_entropy"]
    assert "class probabilities" in report.left[0].reason
