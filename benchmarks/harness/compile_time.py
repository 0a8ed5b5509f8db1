"""torch.compile's modes, and what a run spends on compiling in them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import NamedTuple

COMPILE, MAX_AUTOTUNE = "compile", "max-autotune"

# torch.compile's modes. Without CUDA graphs: a graph's replay spares the launches that all others pay for, writes into
# memory that the next call overwrites, and keeps memory that no counter of a call shows.
MODES = {COMPILE: None, MAX_AUTOTUNE: "max-autotune-no-cudagraphs"}


class CompileTime(NamedTuple):
    """When a run leaves out compilers' results, to end in time.

    Args:
        seconds: How long compiling may take for each operator, by kind of contestant; who comes after that is left out.
        until: Seconds after the start of the run from which on nothing more is compiled.
    """

    seconds: dict[str, float]
    until: float


# A GPU is often at hand for minutes only: its run is to end within 8. What it takes, estimated for 16 CPU cores and an
# H200: 20 s to start and for the ceilings; 35 times (15 cases in training, 20 forward) 2 s to make and verify and 1.5 s
# to time; 2 s for each of 60 compilations of an operator, 7 s for each of 8 of a network; up to 25 s for each of 10 in
# max-autotune, of which the time below admits one or more of each operator, training's first: 6:40 minutes in all. At
# the worst the last compilation begins then, and what is left takes a minute.
COMPILE_TIME = {
    "cpu": CompileTime({}, math.inf),
    "cuda": CompileTime({COMPILE: 75, MAX_AUTOTUNE: 20}, 390),
}


class OutOfTimeError(Exception):
    """A contestant was left out because compiling had already taken the time that the run has for it."""


class Compilers:
    """Keeps count of the time that compiling takes in this run, see `COMPILE_TIME`."""

    def __init__(self) -> None:
        self.start = perf_counter()
        self.spent: defaultdict[tuple[type[object], str], float] = defaultdict(float)

    def seconds(self) -> dict[str, float]:
        """What each of torch.compile's modes took so far."""
        return {
            mode: sum(seconds for (_, kind), seconds in self.spent.items() if kind == mode)
            for mode in MODES
            if any(kind == mode for _, kind in self.spent)
        }

    @contextmanager
    def turn(self, operator: type[object], device: str, kind: str) -> Iterator[None]:
        """Counts the time that passes inside; raises OutOfTimeError instead where there is none left.

        Args:
            operator: The class of its cases.
            device: What is compiled for, `COMPILE_TIME` says.
            kind: The kind of contestant.
        """
        limits, key = COMPILE_TIME[device], (operator, kind)
        if kind in MODES and perf_counter() - self.start > limits.until:
            raise OutOfTimeError(f"no compilation is begun {limits.until:g} s after the start of the run")
        if self.spent[key] > limits.seconds.get(kind, math.inf):
            raise OutOfTimeError(f"{kind} had taken {self.spent[key]:.0f} s to compile cases of this operator before")
        start = perf_counter()
        try:
            yield
        finally:
            self.spent[key] += perf_counter() - start
