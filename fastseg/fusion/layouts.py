"""A pass for Inductor that has tensors of four dimensions lie on a CPU as they do in PyTorch.

Weights that are saved for the backward graph: Inductor lays out in channels_last what leads to a convolution or comes
from one. It counts weights among that, as far as the forward graph returns them to be saved, and copies them all at its
start: a second set of weights, which lives until the backward graph has read it. What is returned as an alias made last
of all is left as it lies.

Upsampled maps in channels_last: Inductor's interpolation forgets the layout, and reads and writes them with a step of a
pixel, four to five times as long.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import inductor_prims
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

_alias, _clone = torch.ops.aten.alias.default, torch.ops.aten.clone.default
_add, _force = torch.ops.aten.add.Tensor, inductor_prims.force_stride_order


class KeepLayouts(CustomGraphPass):
    """For Inductor's configuration, as ``post_grad_custom_post_pass``."""

    def __call__(self, graph: fx.Graph) -> None:
        """Lets the graph return its inputs by way of aliases, and demands the layout of what it upsamples."""
        output = next(iter(reversed(graph.nodes)))
        with graph.inserting_before(output):
            # An alias of an alias: Inductor wants the layout of an input for what reads it at first hand, too.
            aliases = {
                node: _alias_of(_alias_of(node))
                for node in output.all_input_nodes
                if node.op == "placeholder" and _is_map_on_cpu(node)
            }
        output.args = fx.map_arg(output.args, lambda node: aliases.get(node, node))
        for node in graph.find_nodes(op="call_function", target=_clone):
            if node.kwargs.get("memory_format") == torch.channels_last and _is_map_on_cpu(node):
                _demand_layout(_sum_with(node))

    def uuid(self) -> Any:
        """What Inductor's cache of compiled graphs tells this pass by."""
        return get_hash_for_files((__file__,))


def _is_map_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_cpu


def _alias_of(node: fx.Node) -> fx.Node:
    alias = node.graph.call_function(_alias, (node,))
    alias.meta["val"] = node.meta["val"]
    return alias


def _sum_with(map: fx.Node) -> fx.Node:
    """The sum that a map is for alone, so that both are done in one loop; else the map itself."""
    user = next(iter(map.users), map)
    alone = len(map.users) == 1 and user.target is _add and _is_map_on_cpu(user)
    return user if alone and user.meta["val"].stride() == map.meta["val"].stride() else map


def _demand_layout(map: fx.Node) -> None:
    users, strides = list(map.users), map.meta["val"].stride()
    computed = not all(isinstance(stride, int) for stride in strides)  # of sizes that may change
    if computed or any(user.target is _force for user in users):
        return
    with map.graph.inserting_after(map):
        laid_out = map.graph.call_function(_force, (map, strides))
    laid_out.meta["val"] = map.meta["val"]
    for user in users:
        user.replace_input_with(map, laid_out)
