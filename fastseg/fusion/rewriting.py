"""The pass: finds patterns in a graph of torch's own calls, and puts fastseg's operators there."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from fastseg._info import missing_kernels
from fastseg.fusion import effects, trial
from fastseg.fusion.calls import Call, recognise, tensor_of, value_of
from fastseg.fusion.pattern import Match, Pattern, Unfit
from fastseg.fusion.patterns import PATTERNS
from fastseg.fusion.report import Leftover, Replacement, bytes_of, place_of

_CHECKPOINT = "tag_activation_checkpoint"
_KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "custom")


@dataclass(frozen=True)
class _Candidate:
    pattern: Pattern
    anchor: fx.Node
    match: Match


def rewrite(module: fx.GraphModule, patterns: Sequence[Pattern] = PATTERNS) -> tuple[list[Replacement], list[Leftover]]:
    """Replaces, in place, what ``patterns`` find in TorchDynamo's graph; what was replaced, and what was left.

    Bodies of activation checkpoints are rewritten as well.
    """
    bodies = [rewrite(body, patterns) for body in _checkpointed(module)]
    search = _Search(module.graph, patterns)
    chosen = search.run()
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
    return sum((body[0] for body in bodies), replaced), sum((body[1] for body in bodies), search.left)


def _checkpointed(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    for node in module.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "__name__", "") == _CHECKPOINT:
            body = getattr(module, node.args[0].target)
            if isinstance(body, fx.GraphModule):
                yield body


# ---- choosing: no call twice, and no value that is needed elsewhere, too, and that its match doesn't give ----


@dataclass
class _Search:
    """The matches in a graph: each pattern in its turn, where no more valuable one has taken any of the calls.

    Attributes:
        graph: The graph.
        patterns: The patterns, the more valuable first.
        left: What looks like a pattern but isn't fit, each place once for each reason.
    """

    graph: fx.Graph
    patterns: Sequence[Pattern]
    left: list[Leftover] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.calls = recognise(self.graph)
        self.transformed = effects.has_transforms(self.graph)
        self.known: dict[tuple[str, fx.Node], Match | None] = {}  # what was asked once, by pattern and anchor

    def run(self) -> list[_Candidate]:
        """The matches, in the graph's order of their anchors."""
        while True:
            chosen = self._choose()
            escaping = next(self._escaping(chosen), None)
            if escaping is None:
                order = {node: place for place, node in enumerate(self.graph.nodes)}
                return sorted(chosen, key=lambda candidate: order[candidate.anchor])
            candidate, reason = escaping  # without it, others may take its calls
            self._leave(candidate.pattern, candidate.anchor, reason)

    def _choose(self) -> list[_Candidate]:
        """What fits, but for the values that matches share."""
        chosen: list[_Candidate] = []
        taken: set[fx.Node] = set()
        for pattern in self.patterns:
            for call in self.calls.values():
                if call.operation != pattern.anchor or call.node in taken:
                    continue
                match = self._match(pattern, call)
                if match is None or any(node in taken for node in match.nodes):
                    continue
                taken |= set(match.nodes) - set(match.shared)
                chosen.append(_Candidate(pattern, call.node, match))
        return chosen

    def _match(self, pattern: Pattern, call: Call) -> Match | None:
        key = pattern.name, call.node
        if key not in self.known:
            self.known[key] = None
            try:
                match = pattern.match(call)
                reason = self._obstacle(match)
            except Unfit as unfit:
                reason = str(unfit)
            else:
                if reason is None:
                    self.known[key] = match
            if reason:
                self._leave(pattern, call.node, reason)
        return self.known[key]

    def _obstacle(self, match: Match) -> str | None:
        if self.transformed:
            return "the graph enters a transform of torch.func, which the operators don't support"
        hidden = [node for node in match.nodes if node not in match.outputs and node not in match.shared]
        for node in hidden:
            for user in node.users:
                if user not in match.nodes:
                    return self._has_user(node, user)
        return _without_kernel(match) or effects.obstacle(match) or trial.obstacle(match)

    def _escaping(self, chosen: list[_Candidate]) -> Iterator[tuple[_Candidate, str]]:
        """The candidates of which a shared value has a user that isn't replaced, and why that can't be."""
        for candidate in chosen:
            for node in candidate.match.shared:
                replaced = {own for c in chosen if node in c.match.nodes for own in c.match.nodes}
                for user in node.users if node not in candidate.match.outputs else ():
                    if user not in replaced:
                        yield candidate, self._has_user(node, user)

    def _has_user(self, node: fx.Node, user: fx.Node) -> str:
        return f"{self._name(node)} has another user: {self._name(user)}"

    def _name(self, node: fx.Node) -> str:
        call = self.calls.get(node)
        operation = call.operation if call is not None else getattr(node.target, "__name__", node.target)
        return "the graph's output" if node.op == "output" else f"{operation} ({node.name})"

    def _leave(self, pattern: Pattern, anchor: fx.Node, reason: str) -> None:
        self.known[pattern.name, anchor] = None
        place = place_of(anchor)
        if not any((leftover.reason, leftover.place) == (reason, place) for leftover in self.left):
            self.left.append(Leftover(pattern.name, reason, place))  # said once, of the more valuable pattern


def _without_kernel(match: Match) -> str | None:
    """Why a match stays on a device where the operator is plain PyTorch itself, or None."""
    tensor = next((value for node in match.nodes if (value := tensor_of(node)) is not None), None)
    reason = None if tensor is None else missing_kernels(tensor.device.type)
    return None if reason is None else f"the operator would run as plain PyTorch ({reason})"


# ---- replacing ----


def _put(graph: fx.Graph, match: Match, earlier: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """Puts the call that replaces a match before the first of the values that it gives; by what they are replaced.

    The match was found before ``earlier`` values were replaced.
    """
    first = match.place
    with graph.inserting_before(first):
        arguments = fx.map_arg(dict(match.arguments), lambda node: earlier.get(node, node))
        new = graph.call_function(match.function, kwargs=arguments)
        new.meta = {key: first.meta[key] for key in _KEPT_META if key in first.meta}
        values = {node: new if at is None else graph.call_function(operator.getitem, (new, at))
                  for node, at in match.outputs.items()}  # fmt: skip
    for node, value in values.items():
        value.meta = {**new.meta, **({} if value_of(node) is None else {"example_value": value_of(node)})}
        node.replace_all_uses_with(value)
    return values


def _erase(graph: fx.Graph, nodes: set[fx.Node]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in nodes:
            graph.erase_node(node)
