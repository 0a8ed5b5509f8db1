"""A pass for Inductor that has weights saved for the backward graph as they lie, and not as copies.

On CPUs Inductor lays out in channels_last what leads to a convolution or comes from one. It counts weights among that,
as far as the forward graph returns them to be saved, and copies them all at its start: a second set of weights, which
lives until the backward graph has read it. What is returned as an alias made last of all is left as it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_alias = torch.ops.aten.alias.default


class SaveWeightsAsTheyLie(CustomGraphPass):
    """For Inductor's configuration, as ``post_grad_custom_post_pass``."""

    def __call__(self, graph: fx.Graph) -> None:
        """Lets the graph return its inputs of four dimensions, on a CPU, by way of aliases."""
        output = next(iter(reversed(graph.nodes)))
        with graph.inserting_before(output):
            # An alias of an alias: Inductor wants the layout of an input for what reads it at first hand, too.
            aliases = {node: _alias_of(_alias_of(node)) for node in output.all_input_nodes if _is_map_on_cpu(node)}
        output.args = fx.map_arg(output.args, lambda node: aliases.get(node, node))

    def uuid(self) -> Any:
        """What Inductor's cache of compiled graphs tells this pass by."""
        return get_hash_for_files((__file__,))


def _is_map_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "placeholder" and isinstance(value, Tensor) and value.ndim == 4 and value.is_cpu


def _alias_of(node: fx.Node) -> fx.Node:
    alias = node.graph.call_function(_alias, (node,))
    alias.meta["val"] = node.meta["val"]
    return alias
