"""Covering arrays, and what is run of the interpreted tests."""

import heapq
import itertools
from collections.abc import Mapping, Sequence
from random import Random

# What Triton's interpreter runs of the tests, in plain `pytest`: two cases of each, and none of torch's machinery and
# other libraries, which interpret nothing that others don't.
INTERPRETED = (
    "--strength=1", "--most=2", "-k",
    "not (inductor or compiled or export or opcheck or autocast or without_memory or no_gradient or be_retained"
    " or checkpoint or torchmetrics or transformers)",
)  # fmt: skip


def covering(rows: Sequence[Mapping[str, int]], strength: int, seed: str) -> list[int]:
    """Numbers of so few rows that whatever values of ``strength`` parameters meet in a row meet in one of these.

    Greedy: each next row adds the most; among equals, a random one.
    """
    combinations = [set(itertools.combinations(row.items(), min(strength, len(row)))) for row in rows]
    places = Random(seed).sample(range(len(rows)), len(rows))
    heap = [(-len(new), place, row) for row, (place, new) in enumerate(zip(places, combinations, strict=True))]
    heapq.heapify(heap)
    covered, chosen = set(), []
    while heap:
        most, place, row = heapq.heappop(heap)
        new = combinations[row] - covered
        if len(new) == -most:
            covered |= new
            chosen.append(row)
        elif new:  # less than when it was counted: back among the others
            heapq.heappush(heap, (-len(new), place, row))
    return sorted(chosen)
