"""The pass: finds patterns in a graph of torch's own calls, and puts fastseg's operators there."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastseg.fusion import effects, trial
from fastseg.fusion.calls import Attribute, Call, recognise, value_of
from fastseg.fusion.pattern import Match, Pattern, Unfit
from fastseg.fusion.patterns import PATTERNS
from fastseg.fusion.report import Leftover, Replacement, Report, bytes_of, merge, place_of

_CHECKPOINT = "tag_activation_checkpoint"
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


@dataclass(frozen=True)
class _Candidate:
    pattern: Pattern
    match: Match
    anchor: fx.Node


def rewrite(module: fx.GraphModule, patterns: Sequence[Pattern] = PATTERNS) -> Report:
    """Replaces, in place, what ``patterns`` find in a graph before autograd; the report of it.

    The graph calls torch's own functions: TorchDynamo's, or `torch.fx.Tracer`'s with torch.nn's modules as leaves.
    Bodies of activation checkpoints are rewritten as well.
    """
    bodies = [rewrite(body, patterns) for body in _checkpointed(module)]
    candidates, left = _find(module.graph, patterns)
    chosen, spilled = _choose(candidates, patterns)
    left += spilled
    replaced = [
        Replacement(c.pattern.name, c.pattern.becomes, place_of(c.match.nodes[0]), bytes_of(c.match.not_kept))
        for c in chosen
    ]
    if chosen:
        replacements: dict[fx.Node, fx.Node] = {}
        for candidate in chosen:
            replacements |= _put(module.graph, candidate.match, replacements)
        _erase(module.graph, {node for candidate in chosen for node in candidate.match.nodes})
        module.graph.lint()
        module.recompile()
    return merge([Report(tuple(replaced), tuple(left), 1), *(Report(b.replaced, b.left, 0) for b in bodies)])


def _checkpointed(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == _CHECKPOINT:
            body = getattr(module, node.args[0].target)
            if isinstance(body, fx.GraphModule):
                yield body


# ---- finding ----


def _find(graph: fx.Graph, patterns: Sequence[Pattern]) -> tuple[dict[fx.Node, list[_Candidate]], list[Leftover]]:
    """The matches at each anchor, the more valuable first, and what looks like a pattern but isn't fit."""
    candidates: dict[fx.Node, list[_Candidate]] = {}
    left: list[Leftover] = []
    transformed = effects.has_transforms(graph)
    for node in graph.nodes:
        call = recognise(node)
        for pattern in patterns:
            if call is None or pattern.anchor != call.operation:
                continue
            try:
                match = _match(pattern, call, transformed)
            except Unfit as unfit:
                reason, place = str(unfit), place_of(node)
                if not any((leftover.reason, leftover.place) == (reason, place) for leftover in left):
                    left.append(Leftover(pattern.name, reason, place))  # said once, of the more valuable pattern
                continue
            if match is not None:
                candidates.setdefault(node, []).append(_Candidate(pattern, match, node))
    return candidates, left


def _match(pattern: Pattern, call: Call, transformed: bool) -> Match | None:
    match = pattern.match(call)
    if match is None:
        return None
    if transformed:
        raise Unfit("the graph enters a transform of torch.func, which the operators don't support")
    reason = effects.obstacle(match.nodes) or trial.obstacle(match)
    if reason is not None:
        raise Unfit(reason)
    return match


# ---- choosing: no call twice, and no value that is needed elsewhere, too, and that its match doesn't give ----


def _choose(
    candidates: dict[fx.Node, list[_Candidate]], patterns: Sequence[Pattern]
) -> tuple[list[_Candidate], list[Leftover]]:
    """One of the candidates at each anchor, or none; what looks like a pattern, but has a value that must stay."""
    remaining = {anchor: list(alternatives) for anchor, alternatives in candidates.items()}
    left: list[Leftover] = []
    while True:
        chosen = [alternatives[0] for alternatives in remaining.values() if alternatives]
        dropped, reason = _escaping(chosen)
        if dropped is not None:
            left.append(Leftover(dropped.pattern.name, reason, place_of(dropped.anchor)))
        else:  # of those that could be, the more valuable
            dropped = max(_overlapping(chosen), key=lambda candidate: patterns.index(candidate.pattern), default=None)
        if dropped is None:
            return chosen, left
        remaining[dropped.anchor].pop(0)  # and what the others may do depends on it


def _escaping(chosen: list[_Candidate]) -> tuple[_Candidate | None, str]:
    """The first candidate that hides a value from another user, and why it can't."""
    for candidate in chosen:
        match = candidate.match
        others = [other.match for other in chosen if other is not candidate]
        for node in match.nodes:
            for user in node.users if node not in match.outputs else ():
                shared = node in match.shared and any(user in other.nodes and node in other.nodes for other in others)
                if user not in match.nodes and not shared:
                    return candidate, f"{_name(node)} has another user: {_name(user)}"
    return None, ""


def _overlapping(chosen: list[_Candidate]) -> list[_Candidate]:
    """The candidates that would replace calls that another one replaces."""
    claims = Counter(node for c in chosen for node in c.match.nodes if node not in c.match.shared)
    return [
        candidate
        for candidate in chosen
        if any(claims[node] > (node not in candidate.match.shared) for node in candidate.match.nodes)
    ]


def _name(node: fx.Node) -> str:
    call = recognise(node)
    operation = call.operation if call is not None else getattr(node.target, "__name__", node.target)
    return "the graph's output" if node.op == "output" else f"{operation} ({node.name})"


# ---- replacing ----


def _put(graph: fx.Graph, match: Match, earlier: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Puts the call that replaces a match before the first of the values that it gives; by what they are replaced.

    The match was found before ``earlier`` values were replaced.
    """
    first = next(node for node in match.nodes if node in match.outputs)
    with graph.inserting_before(first):
        arguments = fx.map_arg(_resolve(graph, dict(match.arguments)), lambda node: earlier.get(node, node))
        new = graph.call_function(match.function, kwargs=arguments)
        new.meta = {key: first.meta[key] for key in _KEPT_META if key in first.meta}
        values = {node: new if at is None else graph.call_function(operator.getitem, (new, at))
                  for node, at in match.outputs.items()}  # fmt: skip
    for node, value in values.items():
        value.meta = {**new.meta, **({} if value_of(node) is None else {"example_value": value_of(node)})}
        node.replace_all_uses_with(value)
    return values


def _resolve(graph: fx.Graph, value: Any) -> Any:
    """Arguments with get_attr nodes for `Attribute`."""
    if isinstance(value, Attribute):
        return graph.get_attr(value.name)
    if isinstance(value, dict):
        return {key: _resolve(graph, element) for key, element in value.items()}
    return value


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in nodes:
            graph.erase_node(node)
