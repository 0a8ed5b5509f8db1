"""pad by no pixel becomes a copy, which Inductor makes where its value is used.

MONAI's decoders pad every map to its skip's size, whether or not they differ. Inductor reads such a map pixel by pixel,
three to four times as slowly as a copy (2x32x192x192, 2 cores of an AMD Zen 3, 2026-11-28).
"""

from __future__ import annotations

import torch

from fastseg.fusion.calls import Call, has_nodes
from fastseg.fusion.pattern import Match, Pattern, demand


def _match(pad: Call) -> Match:
    demand(not has_nodes(pad["pad"]) and not any(pad["pad"]))
    return Match([pad.node], {pad.node: None}, torch.clone, {"input": pad["input"]})


IDLE_PAD = Pattern("pad by nothing", "pad", "clone", _match)
