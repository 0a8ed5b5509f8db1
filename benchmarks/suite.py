"""A case, its contestants, and how they are verified and timed."""

from __future__ import annotations

import functools
import gc
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.memory import peak_growth
from fastseg.testing import assert_parity

FASTSEG, EAGER, COMPILE = KINDS = ("fastseg", "eager", "compile")
FORWARD, BACKWARD, BOTH = TIMINGS = ("forward", "backward", "forward+backward")

WARM_UP_CALLS = 2
SHORTEST_TIMED = 1e-3  # seconds; shorter calls are repeated, so that the clock's own time doesn't count


class Effort(NamedTuple):
    """How long the contestants of a case are timed: for some seconds, but in no fewer and no more rounds than said."""

    seconds: float
    least_rounds: int
    most_rounds: int


FULL = Effort(seconds=5, least_rounds=9, most_rounds=60)
QUICK = Effort(seconds=0.5, least_rounds=3, most_rounds=10)


class Job(NamedTuple):
    """A call to be timed: ``function(*arguments)``, which returns a tensor, and the gradients that are wanted of it.

    Args:
        function: What is called.
        arguments: Its arguments.
        wanted: The tensors whose gradients are taken. None of them: the call runs under ``no_grad``.
        incoming: The gradient of the output, in the output's layout; None for a scalar output.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...] = ()
    incoming: Tensor | None = None

    def results(self) -> list[Tensor]:
        """The output, then the gradients."""
        with torch.set_grad_enabled(bool(self.wanted)):
            output = self.function(*self.arguments)
        return [output.detach(), *(torch.autograd.grad(output, self.wanted, self.incoming) if self.wanted else ())]

    def seconds(self, calls: int = 1) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass, the mean of some calls. Freeing what they made counts."""
        forward = backward = 0.0
        with torch.set_grad_enabled(bool(self.wanted)):
            for _ in range(calls):
                start = perf_counter()
                output = self.function(*self.arguments)
                if self.wanted:
                    middle = perf_counter()
                    torch.autograd.grad(output, self.wanted, self.incoming)
                    del output
                    end = perf_counter()
                else:
                    del output
                    middle = end = perf_counter()
                forward += middle - start
                backward += end - middle
        return forward / calls, backward / calls


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A line of the tables: an operator on tensors of given sizes.

    Args:
        quick: Whether ``--quick`` measures it too.
    """

    quick: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """What the tables call it, without spaces."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """Length of the longest sum behind an element of the results (see `fastseg.testing.assert_parity`)."""

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory formats that it is measured in."""
        return ("nchw", "channels_last")

    @abstractmethod
    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype = torch.float32) -> Job:
        """The call, by fastseg (fused) or by plain PyTorch; forward and backward (training) or forward alone."""

    def plain(self, training: bool) -> list[Tensor]:
        """Results whose distance from the truth is the measure for the contestants': plain PyTorch's in float32."""
        return self.job(False, "nchw", training).results()

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """What of the results is compared: they themselves, unless there are several right ones."""
        return results

    @property
    def contestants(self) -> list[Contestant]:
        """Who is measured."""
        return [Contestant(kind, layout) for kind in KINDS for layout in self.layouts]


class Contestant(NamedTuple):
    """An implementation in a memory format."""

    kind: str
    layout: str

    def job(self, case: Case, training: bool) -> Job:
        """Its call for ``case``."""
        job = case.job(self.kind == FASTSEG, self.layout, training)
        if self.kind == COMPILE:
            job = job._replace(function=torch.compile(job.function, fullgraph=True, dynamic=False))
        return job


class Measured(NamedTuple):
    """Seconds of the passes in each round, and the bytes that a call needs (None where unknown)."""

    rounds: list[tuple[float, float]]
    peak: int | None

    def seconds(self, timing: str) -> list[float]:
        """Seconds of one pass, or of both, in each round."""
        return [
            {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[timing]
            for forward, backward in self.rounds
        ]


class Verifier:
    """Holds jobs of a case to the float64 truth."""

    def __init__(self, case: Case, training: bool) -> None:
        self.case = case
        self.truth = case.judged(case.job(False, "nchw", training, torch.float64).results())
        self.plain = case.judged(case.plain(training))

    def verify(self, job: Job) -> None:
        """Raise AssertionError where values or gradients are farther from the truth than plain PyTorch's may be."""
        assert_parity(self.case.judged(job.results()), self.plain, self.truth, terms=self.case.terms)


@functools.lru_cache(maxsize=1)  # the contestants of a case come one after the other
def measure(case: Case, training: bool, effort: Effort) -> dict[Contestant, Measured | Exception]:
    """Verify all contestants of a case, then time them in interleaved rounds; the error of those that failed."""
    torch.compiler.reset()  # dynamo gives up on functions that it has compiled for too many shapes
    verifier = Verifier(case, training)
    outcomes: dict[Contestant, Measured | Exception] = {}
    jobs = {}
    for contestant in case.contestants:
        job = contestant.job(case, training)
        try:
            verifier.verify(job)
        except Exception as error:  # a wrong result or a failing compilation: reported, and the others are measured
            outcomes[contestant] = error
        else:
            jobs[contestant] = job
    del verifier
    for contestant, rounds in time_rounds(jobs, effort).items():
        outcomes[contestant] = Measured(rounds, peak_growth(jobs[contestant].seconds))
    return outcomes


def time_rounds(jobs: dict[Contestant, Job], effort: Effort) -> dict[Contestant, list[tuple[float, float]]]:
    """Seconds of the passes of every job in each round; a round is all jobs once, in an order drawn anew."""
    if not jobs:
        return {}
    fastest = min(sum(job.seconds()) for job in jobs.values() for _ in range(WARM_UP_CALLS))
    calls = math.ceil(SHORTEST_TIMED / fastest)
    seconds: dict[Contestant, list[tuple[float, float]]] = {contestant: [] for contestant in jobs}
    order = list(jobs)
    shuffle = random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + effort.seconds
        for round_ in range(effort.most_rounds):
            if round_ >= effort.least_rounds and perf_counter() > end:
                break
            shuffle(order)
            for contestant in order:
                seconds[contestant].append(jobs[contestant].seconds(calls))
    finally:
        gc.enable()
    return seconds
