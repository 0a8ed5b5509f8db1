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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import onnxruntime_peer, openvino_peer
from benchmarks.harness.compile_time import COMPILE, MAX_AUTOTUNE, MODES, Compilers
from benchmarks.harness.devices import CPU, Device
from benchmarks.harness.roofline import Work
from fastseg.testing import assert_parity

FASTSEG, EAGER, OPENVINO, ONNXRUNTIME = "fastseg", "eager", "openvino", "onnxruntime"
KINDS = (FASTSEG, EAGER, COMPILE, MAX_AUTOTUNE, OPENVINO, ONNXRUNTIME)
DEPLOYMENTS = {OPENVINO: openvino_peer, ONNXRUNTIME: onnxruntime_peer}  # on CPUs, with fixed weights
FORWARD, BACKWARD, BOTH = TIMINGS = ("forward", "backward", "forward+backward")

WARM_UP_CALLS = 2
SHORTEST_TIMED = 1e-3  # seconds; shorter calls are repeated, so that the clock's own time doesn't count
SHORTEST_LED = 1e-4  # the same where other work, of a millisecond, goes before each call: a GPU's events cost less


class Effort(NamedTuple):
    """How long the contestants of a case are timed: for some seconds, but in no fewer and no more rounds than said.

    Args:
        seconds: Of all rounds together.
        least_rounds: Rounds at least.
        most_rounds: Rounds at most.
        warm_up_seconds: Of calls that aren't timed, before; at least `WARM_UP_CALLS` of each contestant.
    """

    seconds: float
    least_rounds: int
    most_rounds: int
    warm_up_seconds: float = 0


# Seconds after which the threads of OpenMP, OpenVINO and ONNX Runtime, which spin for up to 10 ms for more work, sleep.
SETTLED = 0.02

# A GPU's clock falls while the host compiles, and takes some 10 ms of work to rise again.
FULL = {"cpu": Effort(5, 9, 60), "cuda": Effort(0.7, 9, 60, warm_up_seconds=0.2)}
QUICK = {"cpu": Effort(0.5, 3, 10), "cuda": Effort(0.2, 3, 10, warm_up_seconds=0.1)}


class Swept(NamedTuple):
    """A point of a sweep, which shows how the cost of an operator grows.

    Args:
        along: What grows.
        value: How large it is.
        class_pixels: Pixels times classes, which the cost should be proportional to.
    """

    along: str
    value: int
    class_pixels: int


class Job(NamedTuple):
    """A call to be timed: ``function(*arguments)``, which returns a tensor, and the gradients that are wanted of it.

    Args:
        function: What is called; without a backward pass it may return several tensors.
        arguments: Its arguments.
        wanted: The tensors whose gradients are taken. None of them: the call runs under ``no_grad``.
        incoming: The gradient of the output, in the output's layout; None for a scalar output.
    """

    function: Callable[..., Any]
    arguments: tuple[Tensor, ...]
    wanted: tuple[Tensor, ...] = ()
    incoming: Tensor | None = None

    def results(self) -> list[Tensor]:
        """The output, or all of several, then the gradients."""
        with torch.set_grad_enabled(bool(self.wanted)):
            output = self.function(*self.arguments)
        gradients = torch.autograd.grad(output, self.wanted, self.incoming) if self.wanted else ()
        outputs = output if isinstance(output, tuple) else (output,)
        return [*(output.detach() for output in outputs), *gradients]

    def seconds(self, device: Device, calls: int = 1, lead: bool = False) -> tuple[float, float]:
        """Seconds of the forward and of the backward pass, the mean of some calls. Freeing what they made counts.

        Args:
            device: Where the tensors are.
            calls: How many calls.
            lead: Whether the device gets some other work before each call (see `Device.lead`).
        """
        marks = []
        with torch.set_grad_enabled(bool(self.wanted)):
            for _ in range(calls):
                if lead:
                    device.lead()
                start = device.mark()
                output = self.function(*self.arguments)
                if self.wanted:
                    middle = device.mark()
                    torch.autograd.grad(output, self.wanted, self.incoming)
                    del output
                    end = device.mark()
                else:
                    del output
                    middle = end = device.mark()
                marks.append((start, middle, end))
        device.wait()
        return (
            sum(device.seconds(start, middle) for start, middle, _ in marks) / calls,
            sum(device.seconds(middle, end) for _, middle, end in marks) / calls,
        )


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A line of the tables: an operator on tensors of given sizes.

    Args:
        device: Where its tensors are. They have the device's dtype.
        quick: Whether ``--quick`` measures it too.
        launch_bound: Whether a GPU is done with a call before the host has launched it. What is timed then are calls
            one after the other, the host's part in them included.
        max_autotune: The memory formats that torch.compile's max-autotune is measured in: it takes long to compile.
        swept: The point of a sweep that it is, measured with ``--sweep`` alone; None for a case of the tables.
    """

    device: Device = CPU
    quick: bool = False
    launch_bound: bool = False
    max_autotune: tuple[str, ...] = ()
    swept: Swept | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """What the tables call it, without spaces."""

    @property
    @abstractmethod
    def terms(self) -> int:
        """Length of the longest sum behind an element of the results (see `fastseg.testing.assert_parity`)."""

    @property
    def partial_sums(self) -> int:
        """Length of the longest sum behind the output whose terms plain PyTorch rounds to a half dtype."""
        return 1

    @property
    def layouts(self) -> tuple[str, ...]:
        """The memory formats that it is measured in."""
        return ("nchw", "channels_last")

    @property
    def timings(self) -> tuple[str, ...]:
        """What of it is timed."""
        return TIMINGS

    @property
    def fullgraph(self) -> bool:
        """Whether torch.compile has to capture the call as one graph."""
        return True

    @property
    def led(self) -> bool:
        """Whether other work goes before each call that is timed, so that its launch doesn't count."""
        return self.device.asynchronous and not self.launch_bound

    @abstractmethod
    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """The call, by fastseg (fused) or by plain PyTorch; forward and backward (training) or forward alone.

        Whatever the dtype (None: the device's), its tensors hold the same numbers, rounded to the device's.
        """

    def work(self, timing: str) -> tuple[Work, ...]:
        """What each pass of a timing can't do without; empty where that isn't known."""
        return ()

    def plain(self, training: bool) -> list[Tensor]:
        """Results whose distance from the truth is the measure for the contestants': plain PyTorch's."""
        return self.job(False, "nchw", training).results()

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """What of the results is compared: they themselves, unless there are several right ones."""
        return results

    @property
    def deployments(self) -> tuple[str, ...]:
        """Of `DEPLOYMENTS` the peers of its forward pass, where that is an inference on images, its first argument."""
        return ()

    def contestants(self, training: bool) -> list[Contestant]:
        """Who is measured, in training or forward alone."""
        deployed = self.deployments if self.device.name == "cpu" and not training else ()

        def takes_part(kind: str, layout: str) -> bool:
            if kind in DEPLOYMENTS:
                return kind in deployed and DEPLOYMENTS[kind].version() is not None
            return kind != MAX_AUTOTUNE or layout in self.max_autotune

        return [Contestant(kind, layout) for kind in KINDS for layout in self.layouts if takes_part(kind, layout)]


class Contestant(NamedTuple):
    """An implementation in a memory format."""

    kind: str
    layout: str

    def job(self, case: Case, training: bool) -> Job:
        """Its call for ``case``."""
        if self.kind in DEPLOYMENTS:
            job = case.job(False, "nchw", training)
            return job._replace(function=DEPLOYMENTS[self.kind].deploy(job.function, job.arguments, self.layout))
        job = case.job(self.kind == FASTSEG, self.layout, training)
        if self.kind in MODES:
            compiled = torch.compile(job.function, fullgraph=case.fullgraph, dynamic=False, mode=MODES[self.kind])
            job = job._replace(function=compiled)
        return job


class Measured(NamedTuple):
    """What is known of a contestant.

    Args:
        rounds: Seconds of the passes in each round.
        peak: Bytes that a call needs; None where unknown.
        returned: Bytes of what it returns, values and gradients.
    """

    rounds: list[tuple[float, float]]
    peak: int | None
    returned: int

    def seconds(self, timing: str) -> list[float]:
        """Seconds of one pass, or of both, in each round."""
        return [
            {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[timing]
            for forward, backward in self.rounds
        ]


class Verifier:
    """Holds jobs of a case to the float64 truth.

    The truth is float64 arithmetic on the very numbers that the contestants get. In float32 a sum of n terms may be
    rounded n times. Half dtypes are summed in float32, by fastseg and its peers alike, so that beside float32's
    roundings there is the result's own; what plain PyTorch rounds before, its own error shows.
    """

    def __init__(self, case: Case, training: bool) -> None:
        self.case = case
        self.truth = case.judged(case.job(False, "nchw", training, torch.float64).results())
        self.plain = case.judged(case.plain(training))
        coarser = torch.finfo(case.device.dtype).eps / torch.finfo(torch.float32).eps
        # A sum's error goes with the square root of its terms.
        self.gradient_terms = max(1, math.ceil(case.terms / coarser**2))
        self.output_terms = max(self.gradient_terms, case.partial_sums)

    def verify(self, job: Job) -> None:
        """Raise AssertionError where values or gradients are farther from the truth than plain PyTorch's may be."""
        results = self.case.judged(job.results())
        assert_parity(results[0], self.plain[0], self.truth[0], terms=self.output_terms)
        try:
            assert_parity(results[1:], self.plain[1:], self.truth[1:], terms=self.gradient_terms)
        except AssertionError as error:
            raise AssertionError(f"gradients: {error}") from None


COMPILERS = Compilers()


@functools.lru_cache(maxsize=1)  # the contestants of a case come one after the other
def measure(case: Case, training: bool, effort: Effort) -> dict[Contestant, Measured | Exception]:
    """Verify all contestants of a case, then time them in interleaved rounds; the error of those that failed."""
    try:
        return verify_and_time(case, training, effort)
    except Exception as error:  # what concerns them all (memory, a lost device) is reported for all, and not repeated
        return dict.fromkeys(case.contestants(training), error)


def verify_and_time(
    case: Case, training: bool, effort: Effort, memory: bool = True
) -> dict[Contestant, Measured | Exception]:
    """See `measure`; raises what doesn't concern a single contestant. Without ``memory``, that is left unknown."""
    torch.compiler.reset()  # dynamo gives up on functions that it has compiled for too many shapes
    verifier = Verifier(case, training)
    outcomes: dict[Contestant, Measured | Exception] = {}
    jobs = {}
    for contestant in case.contestants(training):
        try:
            with COMPILERS.turn(type(case), case.device.name, contestant.kind):
                job = contestant.job(case, training)
                verifier.verify(job)
        except Exception as error:  # a wrong result or a failing compilation: reported, and the others are measured
            outcomes[contestant] = error
        else:
            jobs[contestant] = job
    del verifier
    for contestant, rounds in time_rounds(jobs, effort, case.device, case.led).items():
        results = jobs[contestant].results
        returned = sum(result.untyped_storage().nbytes() for result in results())
        # What is deployed has the memory that it needs before it is called.
        known = memory and contestant.kind not in DEPLOYMENTS
        peak = case.device.peak_growth(results) if known else None
        outcomes[contestant] = Measured(rounds, peak, returned)
    return outcomes


def time_rounds(
    jobs: dict[Contestant, Job], effort: Effort, device: Device, lead: bool
) -> dict[Contestant, list[tuple[float, float]]]:
    """Seconds of the passes of every job in each round; a round is all jobs once, in an order drawn anew.

    The threads of OpenVINO and of ONNX Runtime are not those of all others. Where one of them takes part, each job is
    called untimed before, so that the threads of the one before sleep and its own are awake.
    """
    if not jobs:
        return {}
    fastest, warm_ups, end = math.inf, 0, perf_counter() + effort.warm_up_seconds
    while warm_ups < WARM_UP_CALLS or perf_counter() < end:
        fastest = min(fastest, *(sum(job.seconds(device, 1, lead)) for job in jobs.values()))
        warm_ups += 1
    calls = math.ceil((SHORTEST_LED if lead else SHORTEST_TIMED) / fastest)
    seconds: dict[Contestant, list[tuple[float, float]]] = {contestant: [] for contestant in jobs}
    order = list(jobs)
    shuffle = random.Random(0).shuffle
    foreign = any(contestant.kind in DEPLOYMENTS for contestant in jobs)
    gc.collect()
    gc.disable()
    try:
        end = perf_counter() + effort.seconds
        for round_ in range(effort.most_rounds):
            if round_ >= effort.least_rounds and perf_counter() > end:
                break
            shuffle(order)
            for contestant in order:
                if foreign:
                    settle(jobs[contestant], device)
                seconds[contestant].append(jobs[contestant].seconds(device, calls, lead))
    finally:
        gc.enable()
    return seconds


def settle(job: Job, device: Device) -> None:
    """Calls of a job that aren't timed, for `SETTLED` seconds."""
    end = perf_counter() + SETTLED
    job.seconds(device)
    while perf_counter() < end:
        job.seconds(device)
