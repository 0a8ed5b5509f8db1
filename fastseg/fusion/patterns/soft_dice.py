"""The sums of a soft Dice loss over softmax and labels, as segmentation_models_pytorch writes them, become one pass.

With p the softmax and t the labels' one-hot, both ``[N, C, pixels]`` and zero at pixels that are ignored, if any are:
``sum(p)``, ``sum(t)`` and their overlap ``(sum(p) + sum(t) - sum(|p - t|)) / 2``, each over images and pixels. The
multiclass DiceLoss and TverskyLoss go on from there; what they do with numbers of a class stays.

A NaN in the logits of an ignored pixel doesn't reach the sums, where ``NaN * 0`` does.

Not recognised: MONAI's DiceCELoss and DiceFocalLoss, whose ``torch.arange(...).tolist()`` breaks TorchDynamo's graph
between the softmax and its sums (their cross-entropy is found); focal losses, which SMP writes as a chain of calls for
each class, in as many forms as they have options. `fastseg.losses` has drop-ins of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fastseg.functional._checks import FLOATING_DTYPES, pixels_of
from fastseg.fusion.calls import Call, recognise, tensor_of
from fastseg.fusion.pattern import Match, Pattern, Unfit, demand
from fastseg.losses._sums import IGNORE_NONE, softmax_sums

OVER = (0, 2)  # images and pixels of [N, C, pixels]


class _Other(Exception):  # noqa: N818 - no error: calls that are something else
    pass


def dice_sums(
    input: Tensor, target: Tensor, ignore_index: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the graph calls: of each class sum(p), sum(t), their overlap, and sum(t) in int64."""
    labels = target.reshape(pixels_of(input))
    _, sums = softmax_sums(input, labels, IGNORE_NONE if ignore_index is None else ignore_index)
    overlap, predicted, labelled = sums.sum(1)
    return predicted.to(dtype), labelled.to(dtype), overlap.to(dtype), labelled.long()


# ---- reading calls that no other pattern knows ----


def _read(node: Any, name: str, *, least: int = 1) -> tuple[Any, ...]:
    """The arguments of a call without keywords, by the name of what it calls."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or node.kwargs:
        raise _Other
    if getattr(node.target, "__name__", node.target) != name or len(node.args) < least:
        raise _Other
    return node.args


def _expect(condition: bool) -> None:
    if not condition:
        raise _Other


def _sum_of(node: fx.Node) -> fx.Node:
    """The user of a map that sums it over images and pixels."""
    found = []
    for user in node.users:
        dims = user.kwargs.get("dim", user.args[1] if len(user.args) > 1 else None)
        is_sum = getattr(user.target, "__name__", user.target) == "sum" and user.args[0] is node
        if is_sum and isinstance(dims, Sequence) and tuple(dims) == OVER and set(user.kwargs) <= {"dim"}:
            found.append(user)
    _expect(len(found) == 1)
    return found[0]


def _user(node: fx.Node, name: str, *args: Any) -> fx.Node:
    """The user of a value that calls ``name`` with these arguments."""
    found = [user for user in node.users if getattr(user.target, "__name__", user.target) == name and user.args == args]
    _expect(len(found) == 1)
    return found[0]


# ---- the chain ----


def _match(norm: Call) -> Match | None:
    try:
        return _chain(norm)
    except _Other:
        return None


def _chain(norm: Call) -> Match:
    plain = not norm["keepdim"] and norm["dtype"] is None
    _expect(plain and norm["ord"] == 1 and isinstance(norm["dim"], Sequence) and tuple(norm["dim"]) == OVER)
    probabilities, one_hot = _read(norm["input"], "sub", least=2)
    of_labels, like = _read(one_hot, "type_as", least=2)
    _expect(like is probabilities)
    predicted, labelled = _sum_of(probabilities), _sum_of(one_hot)
    both = _user(predicted, "add", predicted, labelled)
    doubled = _user(norm.node, "sub", both, norm.node)
    overlap = _user(doubled, "truediv", doubled, 2)
    count = _sum_of(of_labels)
    shapes = [None if (t := tensor_of(node)) is None else t.shape for node in (probabilities, one_hot)]
    _expect(shapes[0] is not None and shapes[0] == shapes[1])

    ignored = getattr(probabilities.target, "__name__", "") == "mul"
    softmax, softmax_nodes, mask = _softmax(probabilities, ignored)
    target, ignore_index, label_nodes = _labels(of_labels, mask)
    logits, labels = tensor_of(softmax["input"]), tensor_of(target)
    if logits is None or labels is None:
        raise Unfit("soft Dice: shapes aren't known before the model runs")
    demand(softmax["dim"] == 1 and softmax["dtype"] is None, "soft Dice: log_softmax over another dimension")
    demand(logits.dtype in FLOATING_DTYPES and labels.dtype == torch.int64, "soft Dice: no int64 labels")
    nodes = {*softmax_nodes, *label_nodes, probabilities, of_labels, one_hot, predicted, labelled, both}
    nodes |= {norm["input"], norm.node, doubled, overlap, count}
    known = tensor_of(probabilities)
    assert known is not None
    return Match(
        nodes=[node for node in norm.node.graph.nodes if node in nodes],
        outputs={predicted: 0, labelled: 1, overlap: 2, count: 3},
        function=dice_sums,
        arguments={
            "input": softmax["input"], "target": target, "ignore_index": ignore_index, "dtype": known.dtype,
        },
        not_kept=[softmax.node, probabilities, one_hot, norm["input"], of_labels],
    )  # fmt: skip


def _softmax(probabilities: fx.Node, ignored: bool) -> tuple[Call, list[fx.Node], Any]:
    """The log_softmax behind the probabilities, the calls from it on, and the mask ``[N, pixels]`` of what counts."""
    nodes, mask, rows = [], None, probabilities
    if ignored:
        rows, unsqueezed = _read(probabilities, "mul", least=2)
        mask, dim = _read(unsqueezed, "unsqueeze", least=2)
        _expect(dim == 1)
        nodes += [rows, unsqueezed]
    exponential, *_, rest = _read(rows, "reshape", least=4)
    (scores,) = _read(exponential, "exp")
    softmax = recognise(scores)
    if softmax is None or softmax.operation != "log_softmax":
        raise _Other
    map, flat = tensor_of(exponential), tensor_of(rows)
    _expect(rest == -1 and map is not None and flat is not None and map.shape[:2] == flat.shape[:2])
    return softmax, [*nodes, exponential, scores], mask


def _labels(of_labels: fx.Node, mask: Any) -> tuple[fx.Node, int | None, list[fx.Node]]:
    """The labels behind their one-hot, the label that is ignored, and the calls between."""
    if mask is None:
        encoded, *dims = _read(of_labels, "permute", least=4)
        rows, _ = _read(encoded, "one_hot", least=2)
        target, _, rest = _read(rows, "reshape", least=3)
        _expect(dims == [0, 2, 1] and rest == -1)
        return target, None, [encoded, rows]
    permuted, unsqueezed = _read(of_labels, "mul", least=2)
    same_mask, dim = _read(unsqueezed, "unsqueeze", least=2)
    encoded, *dims = _read(permuted, "permute", least=4)
    converted, _ = _read(encoded, "one_hot", least=2)
    zeroed, dtype = _read(converted, "to", least=2)
    rows, factor = _read(zeroed, "mul", least=2)
    target, _, rest = _read(rows, "reshape", least=3)
    compared, ignore_index = _read(mask, "ne", least=2)
    _expect(dims == [0, 2, 1] and rest == -1 and dim == 1 and dtype == torch.int64 and isinstance(ignore_index, int))
    _expect(same_mask is mask and factor is mask and compared is rows)
    return target, ignore_index, [permuted, unsqueezed, encoded, converted, zeroed, rows, mask]


SOFT_DICE = Pattern("log_softmax + exp + one_hot + sums", "vector_norm", "cross_entropy_dice", _match)
