"""The benchmark suite's upsampling operators: verified and timed, refused where wrong; sweeps; extra memory."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastseg import functional

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from benchmarks import __main__, conftest
from benchmarks.cases import upsampling
from benchmarks.cases.bench_upsample_argmax import UpsampleArgmaxCase
from benchmarks.cases.bench_upsample_confusion_matrix import IGNORED, UpsampleConfusionMatrixCase
from benchmarks.cases.bench_upsample_cross_entropy import UpsampleCrossEntropyCase
from benchmarks.cases.bench_upsample_mask_argmax import UpsampleMaskArgmaxCase
from benchmarks.cases.bench_upsample_threshold import UpsampleThresholdCase
from benchmarks.cases.upsampling import UpsamplingCase
from benchmarks.harness import memory, suite
from benchmarks.harness.devices import CPU, CUDA, Device
from benchmarks.harness.roofline import Ceilings, Work
from benchmarks.harness.suite import BACKWARD, BOTH, EAGER, FASTSEG, FORWARD, Contestant, Swept
from benchmarks.reports import report
from benchmarks.reports import sweep as sweep_report
from tests.benchmarks.cases import DEVICES, HALF_CPU, ONE_ROUND, RUN, gradient_off_by, off_by

LOSS = UpsampleCrossEntropyCase((2, 5, 6, 8), (24, 32))
LABELS = UpsampleArgmaxCase((2, 5, 6, 8), (24, 32))
MATRIX = UpsampleConfusionMatrixCase((2, 5, 6, 8), (24, 32))
CASES = [
    LOSS,
    UpsampleCrossEntropyCase((2, 5, 6, 8), (24, 32), mode="nearest"),
    UpsampleCrossEntropyCase((2, 5, 7, 9), (31, 45)),
    UpsampleCrossEntropyCase((2, 5, 6, 8), (24, 32), dice=True),
    LABELS,
    UpsampleArgmaxCase((2, 5, 6, 8), (24, 32), mode="nearest"),
    UpsampleArgmaxCase((2, 300, 7, 9), (31, 45)),  # labels that uint8 doesn't hold
    MATRIX,
    UpsampleConfusionMatrixCase((2, 5, 7, 9), (31, 45), mode="nearest"),
    UpsampleThresholdCase((2, 5, 7, 9), (31, 45), scores=True),
    UpsampleMaskArgmaxCase((2, 5, 7, 9), (31, 45), classes=7),
]
MIB = 2**20
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _without_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "KINDS", (FASTSEG, EAGER))  # they take seconds, and are not ours


def case_id(case: UpsamplingCase) -> str:
    return f"{type(case).__name__.removesuffix('Case')}-{case.name}"


# ---- verified and timed ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_contestant_is_verified_and_timed(case: UpsamplingCase, device: Device) -> None:
    case = dataclasses.replace(case, device=device)
    for training in sorted({timing != FORWARD for timing in case.timings}):
        outcomes = suite.measure.__wrapped__(case, training, ONE_ROUND)
        assert set(outcomes) == set(case.contestants(training))
        for outcome in outcomes.values():
            assert isinstance(outcome, suite.Measured), outcome
            assert (outcome.rounds[0][1] > 0) == training
            assert outcome.returned == sum(result.nbytes for result in case.job(False, "nchw", training).results())


def moved(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: operator(*args, **kwargs).roll(1, -1)


def of_another_class(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Tensor, **kwargs: object) -> Tensor:
        labels = operator(*args, **kwargs)
        labels[-1, -1, -1] = (labels[-1, -1, -1] + 1) % 5
        return labels

    return call


def outside_the_classes(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: operator(*args, **kwargs) + 5


def with_a_count_moved(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Tensor, **kwargs: object) -> Tensor:
        matrix = operator(*args, **kwargs)
        return matrix + torch.diag(torch.tensor([1, -1, 0, 0, 0]))

    return call


@pytest.mark.parametrize(
    ("case", "device", "mistake"),
    [
        pytest.param(LOSS, CPU, off_by(1.001), id="loss-value"),
        pytest.param(LOSS, CPU, gradient_off_by(1.001), id="loss-gradient"),
        pytest.param(dataclasses.replace(LOSS, dice=True), CPU, gradient_off_by(1.001), id="dice-gradient"),
        pytest.param(LOSS, HALF_CPU, gradient_off_by(1.05), id="loss-gradient-bfloat16"),
        pytest.param(LABELS, CPU, moved, id="labels-moved"),
        pytest.param(LABELS, CPU, of_another_class, id="a-label-of-another-class"),
        pytest.param(LABELS, CPU, outside_the_classes, id="labels-outside"),
        pytest.param(LABELS, HALF_CPU, moved, id="labels-moved-bfloat16"),
        pytest.param(MATRIX, CPU, with_a_count_moved, id="counts"),
        pytest.param(MATRIX, HALF_CPU, with_a_count_moved, id="counts-bfloat16"),
    ],
)
def test_a_wrong_operator_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
    case: UpsamplingCase,
    device: Device,
    mistake: Callable[[Callable[..., Tensor]], Callable[..., Tensor]],
) -> None:
    case = dataclasses.replace(case, device=device)
    names = {LABELS: "upsample_argmax", MATRIX: "upsample_confusion_matrix"}
    name = next((names[known] for known in names if type(known) is type(case)), "upsample_cross_entropy")
    name += "_dice" if getattr(case, "dice", False) else ""
    monkeypatch.setattr(functional, name, mistake(getattr(functional, name)))
    for contestant, outcome in suite.measure.__wrapped__(case, case.timings != (FORWARD,), ONE_ROUND).items():
        assert isinstance(outcome, AssertionError if contestant.kind == FASTSEG else suite.Measured), outcome


@pytest.mark.parametrize("size", [(24, 32), (31, 45), (257, 300)], ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (1, 3, 65, 40)], ids=str)
def test_roundings_bound_an_upsampled_logits_error(shape: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    case = UpsampleArgmaxCase(shape, size)
    logits = case.make_logits()
    upsampled = F.interpolate(logits, size, mode="bilinear")
    truth = case.map_upsampled(lambda logits, image: logits)
    bound = case.roundings * torch.finfo(torch.float32).eps * logits.abs().amax()
    assert 0 < (upsampled - truth).abs().amax() <= bound
    assert dataclasses.replace(case, mode="nearest").roundings == 0


@pytest.mark.parametrize(("device", "most"), [(CPU, 0.001), (HALF_CPU, 0.05)], ids=["float32", "bfloat16"])
def test_few_pixels_are_ignored_because_rounding_decides_them(device: Device, most: float) -> None:
    case = UpsampleConfusionMatrixCase((1, 21, 32, 32), (128, 128), device=device)
    assert (case.target == IGNORED).float().mean() <= most
    labels = case.target[case.target != IGNORED]
    assert labels.unique().tolist() == list(range(21))


def test_work_before_upsampling_alone() -> None:
    logits, pixels = 2 * 5 * 6 * 8, 2 * 24 * 32
    loss = dataclasses.replace(LOSS, device=CUDA)
    forward, backward = Work(2 * logits + 8 * pixels), Work(2 * 2 * logits + 8 * pixels)
    assert loss.work(FORWARD) == (forward,)
    assert loss.work(BACKWARD) == (backward,)
    assert loss.work(BOTH) == (forward, backward)
    assert LABELS.work(FORWARD) == (Work(4 * logits + pixels),)
    assert MATRIX.work(FORWARD) == (Work(4 * logits + 8 * (pixels + 5 * 5)),)


def test_training_is_measured_first() -> None:
    items = [SimpleNamespace(callspec=SimpleNamespace(params={"timing": timing})) for timing in suite.TIMINGS]
    items = [SimpleNamespace(), *items, SimpleNamespace(callspec=SimpleNamespace(params={}))]  # of other directories
    forward = items[1]
    conftest.pytest_collection_modifyitems(items)
    assert items.index(forward) == len(items) - 1
    assert [item.callspec.params["timing"] for item in items[1:3]] == [BACKWARD, BOTH]


# ---- memory ----

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of the resident set is known on Linux alone")

# Far more than malloc ever keeps for later, in a block (32 MiB, mallopt(3)) or where blocks lie side by side that other
# tests freed: the operating system gives it, and takes it back when it is freed.
LARGE = 256 * MIB
NOISE = 2 * report.LEAST_EXTRA  # the size before and the peak are two readings


@pytest.fixture
def one_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that `LARGE` tensors don't come from may have been given to other tests' threads."""
    monkeypatch.setattr(memory, "_count_arenas", lambda: 1)


def ones(size: int) -> Tensor:
    return torch.ones(size // torch.float32.itemsize)


@needs_linux
@pytest.mark.usefixtures("one_arena")
def test_memory_that_a_thread_keeps_for_its_next_call_counts() -> None:
    kept = threading.local()

    def call() -> None:
        if not hasattr(kept, "scratch"):
            kept.scratch = ones(LARGE)  # as fastseg's kernels keep their scratch memory

    call()
    assert memory.peak_growth(call) == pytest.approx(LARGE, abs=NOISE)


@needs_linux
@pytest.mark.usefixtures("one_arena")
def test_memory_that_is_freed_before_the_call_ends_counts() -> None:
    def call() -> None:
        ones(LARGE)
        ones(LARGE // 4)

    assert memory.peak_growth(call) == pytest.approx(LARGE, abs=NOISE)


@needs_linux
@pytest.mark.usefixtures("one_arena")
def test_garbage_from_before_hides_nothing() -> None:
    def call() -> None:
        allocated = [[] for _ in range(2 * gc.get_threshold()[0])]  # enough for a collection
        ones(LARGE)
        allocated.clear()

    gc.collect()
    garbage: list[object] = [ones(LARGE)]
    garbage.append(garbage)
    del garbage
    assert memory.peak_growth(call) == pytest.approx(LARGE, abs=NOISE)
    assert gc.isenabled()


@needs_linux
@pytest.mark.usefixtures("one_arena")
def test_an_error_of_the_measured_call_is_raised() -> None:
    def call() -> None:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        memory.peak_growth(call)
    assert gc.isenabled()


@needs_linux
@pytest.mark.parametrize("known", [True, False], ids=["import before threads", "threads before import"])
def test_growth_is_unknown_where_threads_have_arenas_of_their_own(known: bool) -> None:
    load, start = "from benchmarks.harness import memory", "threading.Thread(target=list).start()"
    show = "print(memory.unknown() is None, memory.peak_growth(list) is None)"
    program = "; ".join(["import threading", *([load, start] if known else [start, load]), show])
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    assert answer.stdout.split() == [str(known), str(not known)]


OWN, PEER = Contestant(FASTSEG, "nchw"), Contestant(EAGER, "nchw")


@pytest.mark.parametrize(
    ("own", "peer", "text"),
    [(2 * MIB, 90 * MIB, "45.0x"), (0, 90 * MIB, "> 360x"), (0, 1000, "-"), (MIB, None, "-"), (None, MIB, "-")],
    ids=["both", "own below noise", "both below noise", "no peer", "no own"],
)
def test_extra_memory_is_compared(own: int | None, peer: int | None, text: str) -> None:
    extras = {contestant: extra for contestant, extra in ((OWN, own), (PEER, peer)) if extra is not None}
    assert report.Row({}, {}, extras, {}, []).extra_over(OWN, PEER) == text


# ---- sweeps ----


@pytest.mark.parametrize(("make", "timings"), [(UpsampleCrossEntropyCase, (BOTH,)), (UpsampleArgmaxCase, (FORWARD,))])
def test_a_sweep(make: type[UpsamplingCase], timings: tuple[str, ...]) -> None:
    cases = upsampling.sweep(make, CPU)
    by_classes, by_side = (
        [case for case in cases if case.swept.along == along] for along in ("classes", "output side")
    )
    assert [case.shape[1] for case in by_classes] == [2, 5, 10, 21, 50, 150, 300, 1000]
    assert {(case.size, case.shape[2:]) for case in by_classes} == {((256, 256), (64, 64))}
    assert [case.size for case in by_side] == [(side, side) for side in (128, 256, 512, 1024, 2048)]
    assert {case.shape[1] for case in by_side} == {19}
    for case in cases:
        assert case.swept.class_pixels == case.shape[1] * case.size[0] * case.size[1]
        assert case.swept.value in (case.shape[1], case.size[0])
        assert case.contestants(True) == [OWN, PEER]
        assert case.timings == timings
    assert [case.swept.value for case in cases if case.quick] == [2, 128]


def point(swept: Swept, kind: str, seconds: list[float], extra: int) -> dict:
    info = {
        "operator": "upsample", "case": f"case {swept.along} {swept.value}", "timing": BOTH, "kind": kind,
        "layout": "nchw", "swept": swept, "peak_bytes": extra + 100, "returned_bytes": 100, "work": [],
    }  # fmt: skip
    return {"extra_info": info, "stats": {"data": seconds}}


def test_report_of_a_sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    large, small, side = Swept("classes", 50, 2_000_000), Swept("classes", 2, 80_000), Swept("output side", 9, 1000)
    missing = {"operator": "upsample", "case": "case output side 9", "timing": BOTH, "layout": "nchw", "swept": side}
    run = {
        **RUN,
        "device": {"type": "cpu", "dtype": "float32", "title": "portable kernels"},
        "compiling": {}, "log": [], "sweep": True, "peers": {},
        "absent": {"peak memory": "this is no Linux"},
        "benchmarks": [
            point(large, FASTSEG, [0.002, 0.004, 0.006], 2 * MIB),
            point(large, EAGER, [0.020, 0.060, 0.030], 50 * MIB),
            point(small, FASTSEG, [0.0001], MIB),
            point(small, EAGER, [0.0008], 2 * MIB),
            point(side, FASTSEG, [0.000002], MIB),
        ],
        "missing": [missing | {"kind": EAGER, "skipped": False, "reason": "OutOfMemoryError: no memory"}],
    }  # fmt: skip
    source, path = tmp_path / "run.json", tmp_path / "results" / "sweep.md"
    source.write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--from", str(source), "--out", str(path)])
    assert __main__.main() == 0
    text = path.read_text()
    for lines in (
        "## upsample, forward+backward, by classes\n",
        # In the order of the classes; 0.1 ms of 80000 class-pixels are 1.25 ns each.
        "| 2 | 0.0800 | 0.100 (0.100 - 0.100) | 0.800 (0.800 - 0.800) | 1.25 | 10.0 | 8.00x (8.00 - 8.00) "
        "| 1.0 | 2.0 | 2.00x |\n"
        "| 50 | 2.00 | 4.00 (3.00 - 5.00) | 30.0 (25.0 - 45.0) | 2.00 | 15.0 | 10.00x (7.50 - 12.50) "
        "| 2.0 | 50.0 | 25.0x |\n",
        "| 9 | 0.00100 | 0.00200 (0.00200 - 0.00200) | failed | 2.00 | - | - | 1.0 | - | - |\n",
        "## Not measured\n\n* peak memory: this is no Linux\n",
        "* upsample case output side 9, forward+backward, eager NCHW, failed: `OutOfMemoryError: no memory`",
    ):
        assert lines in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_one_sweep_alone_is_drawn(tmp_path: Path) -> None:
    swept = Swept("classes", 2, 1000)
    row = report.Row({OWN: [0.001]}, {}, {}, {}, [])
    path = tmp_path / "chart.png"
    sweep_report.draw({("upsample", "classes"): [sweep_report.Point(swept, BOTH, row)]}, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_cases_without_a_gradient_have_no_lines_of_one() -> None:
    row = report.Row({OWN: [0.001]}, {OWN: 3 * MIB}, {OWN: MIB}, {}, [])
    none = report.Row({}, {}, {}, {}, [])
    timings = {FORWARD: row, BACKWARD: none, BOTH: none}
    for table in (report.time_table({"small": timings}), report.memory_table({"small": timings})):
        assert [line.split(" | ")[1] for line in table.splitlines() if line.startswith("| small")] == [FORWARD]
    assert "| 3.0 | - |" in report.summary({("upsample_argmax", "small"): timings}, Ceilings(1e9, 1e9))
