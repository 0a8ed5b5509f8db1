"""The tuner: what it tries, what it chooses and what it writes. Only the tests marked gpu time anything."""

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastseg._native import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set, and interpreted kernels can't be compiled", allow_module_level=True)

from fastseg.kernels import compile, launch, tune  # noqa: E402
from fastseg.kernels.launch import Plan  # noqa: E402
from fastseg.kernels.specimen import Specimen  # noqa: E402
from fastseg.kernels.specimens import SPECIMENS  # noqa: E402

DEFAULT = Plan({"BLOCK_P": 64, "BLOCK_O": 16}, num_warps=4, num_stages=2)
TARGET = compile.parse_target("cuda:90")
CPU = torch.device("cpu")
KERNEL = SimpleNamespace(fn=SimpleNamespace(__name__="pretended"))  # as much of a kernel as `launch.choose` looks at


def differences(plan: Plan, other: Plan) -> int:
    numbers, others = ({**p.tile, "warps": p.num_warps, "stages": p.num_stages} for p in (plan, other))
    return sum(numbers[name] != others[name] for name in numbers)


# ---- candidates ----


def test_candidates_change_one_number_first() -> None:
    counts = [differences(plan, DEFAULT) for plan in tune.candidates(DEFAULT, 2)]
    assert counts == sorted(counts)
    assert {*counts} == {1, 2}


def test_candidates_are_distinct() -> None:
    plans = tune.candidates(DEFAULT, 2)
    assert all(plan not in plans[:at] for at, plan in enumerate(plans))


def test_candidates_halve_double_and_step() -> None:
    assert tune.candidates(DEFAULT, 1) == [
        Plan({"BLOCK_P": 32, "BLOCK_O": 16}, 4, 2),
        Plan({"BLOCK_P": 128, "BLOCK_O": 16}, 4, 2),
        Plan({"BLOCK_P": 64, "BLOCK_O": 8}, 4, 2),
        Plan({"BLOCK_P": 64, "BLOCK_O": 32}, 4, 2),
        Plan(DEFAULT.tile, 2, 2),
        Plan(DEFAULT.tile, 8, 2),
        Plan(DEFAULT.tile, 4, 1),
        Plan(DEFAULT.tile, 4, 3),
    ]


def test_candidates_of_unpipelined_kernels_have_one_stage_and_no_empty_tile() -> None:
    plans = tune.candidates(Plan({"BLOCK": 1}), 2)
    assert all(plan.num_stages == 1 and plan.tile["BLOCK"] in (1, 2) for plan in plans)


def test_subjects_are_every_tuned_bucket() -> None:
    subjects = tune.find_subjects(SPECIMENS)
    by_key = {(subject.kernel, subject.bucket): subject for subject in subjects}
    assert len(by_key) == len(subjects)
    rows = by_key["cross_entropy_backward_rows", "rows"]
    assert [specimen.name.split()[1] for specimen in rows.specimens][:2] == ["16x11x512x1024", "16x19x512x1024"]
    assert all(specimen.tuned for subject in subjects for specimen in subject.specimens)


def test_subjects_come_by_their_value() -> None:
    kernels = list(dict.fromkeys(subject.kernel for subject in tune.find_subjects(SPECIMENS)))
    assert kernels[0] == "upsample_cross_entropy_backward"
    firsts = [next(name for name in kernels if name.startswith(first)) for first in tune.MOST_VALUABLE]
    assert firsts == sorted(firsts, key=kernels.index)


# ---- choosing ----


def test_search_walks_on_from_what_is_faster() -> None:
    best = Plan(
        {"BLOCK_P": 512, "BLOCK_O": 16}, num_warps=8, num_stages=2
    )  # three doublings and one step of warps away

    def time_all(plans: list[Plan]) -> Iterator[tuple[Plan, float]]:
        for plan in plans:
            yield plan, 1 + abs(math.log2(plan.tile["BLOCK_P"] / 512)) + differences(plan, best)

    assert tune.search(DEFAULT, time_all) == (best, 1.0)


def test_search_times_nothing_twice() -> None:
    timed: list[Plan] = []

    def time_all(plans: list[Plan]) -> Iterator[tuple[Plan, float]]:
        for plan in plans:
            assert plan not in timed
            timed.append(plan)
            yield plan, 1 / len(timed)

    ends = iter([None] * 3)
    tune.search(DEFAULT, lambda plans: time_all(plans) if next(ends, "end") is None else iter(()))
    assert len(timed) > len(tune.candidates(DEFAULT, 2))


def test_search_keeps_the_default_where_nothing_works() -> None:
    assert tune.search(DEFAULT, lambda plans: iter([(DEFAULT, 1.0)] if plans == [DEFAULT] else [])) == (DEFAULT, 1.0)


@pytest.mark.parametrize(
    ("expected", "actual", "same"),
    [
        pytest.param([1.0, 100.0], [1.0, 100.0], True, id="equal"),
        pytest.param([1.0, 100.0], [1.0 + 2**-7, 100.0], True, id="one unit in the last place"),
        pytest.param([1.0, 100.0], [1.05, 100.0], False, id="seven units"),
        pytest.param([0.0, 100.0], [0.001, 100.0], True, id="a cancelled sum"),
        pytest.param([0.0, 100.0], [0.1, 100.0], False, id="no sum's rounding"),
        pytest.param([math.nan, 1.0], [math.nan, 1.0], True, id="nan in both"),
        pytest.param([0.0, 1.0], [math.nan, 1.0], False, id="nan in one"),
        pytest.param([math.inf, 1.0], [5.0, 1.0], False, id="infinite in one"),
        pytest.param([math.inf, 1.0], [math.inf, 5.0], False, id="another beside an infinite one"),
        pytest.param([], [], True, id="empty"),
    ],
)
def test_mismatch_of_values(expected: list[float], actual: list[float], same: bool) -> None:
    tensors = (torch.tensor(values, dtype=torch.bfloat16) for values in (actual, expected))
    assert (tune.mismatch(*tensors) is None) == same


@pytest.mark.parametrize(("different", "same"), [(1, True), (20, False)])
def test_mismatch_of_positions(different: int, same: bool) -> None:
    expected = torch.zeros(10_000, dtype=torch.uint8)
    actual = expected.index_fill(0, torch.arange(different), 3)
    assert (tune.mismatch(actual, expected) is None) == same


def test_plans_that_cannot_be_compiled_are_told_apart() -> None:
    subject = next(item for item in tune.find_subjects(SPECIMENS) if item.kernel == "cross_entropy_finish")
    calls = [specimen.prepare(torch.device("meta")) for specimen in subject.specimens[:2]]
    problems = tune.compile_plans(subject, calls, TARGET, [subject.default, Plan({"BLOCK": 3}), Plan({"BLOCK": 512})])
    assert [problem is None for problem in problems] == [True, False, True]
    assert problems[1] is not None
    assert problems[1].startswith("CompilationError: ")


# ---- a subject, with a pretended kernel and clock ----


class Pretended:
    """A kernel on the CPU: its result and its time depend on the plan that serves the call."""

    def __init__(self, milliseconds: dict[int, float], wrong: int = 0, too_large: int = 0) -> None:
        self.milliseconds, self.wrong, self.too_large = milliseconds, wrong, too_large
        self.default = Plan({"BLOCK": 64})

    @property
    def block(self) -> int:
        return launch.choose(KERNEL, "all", {"all": self.default}, CPU).tile["BLOCK"]

    def prepare(self, device: torch.device) -> tune.Call:
        output = torch.empty(4, device=device)

        def call() -> tuple[torch.Tensor, ...]:
            if self.block == self.too_large:
                raise tune.OutOfResources(self.block, 100, "shared memory")
            if self.block != self.wrong:
                output.fill_(1.0)
            return (output,)

        return call

    @property
    def subject(self) -> tune.Subject:
        return tune.Subject("pretended", "all", self.default, [Specimen("pretended", self.prepare, True)])


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Tunes a pretended kernel."""

    def tune_it(kernel: Pretended, deadline: float = math.inf) -> dict:
        monkeypatch.setattr(tune, "WARPS", (4,))
        monkeypatch.setattr(tune, "do_bench", lambda call, **options: kernel.milliseconds.get(kernel.block, 9.0))
        monkeypatch.setattr(tune, "compile_plans", lambda subject, calls, target, plans: [None] * len(plans))
        return tune.tune(kernel.subject, CPU, TARGET, deadline)

    return tune_it


def test_fastest_plan_wins(run) -> None:
    row = run(Pretended({32: 1.5, 64: 1.0, 128: 0.8, 256: 0.5, 512: 0.7}))
    assert (row["kernel"], row["bucket"], row["tile"]) == ("pretended", "all", {"BLOCK": 256})
    assert (row["ms"], row["default_ms"]) == (0.5, 1.0)


def test_default_stays_where_the_gain_is_noise(run) -> None:
    row = run(Pretended({64: 1.0, 128: 1 - tune.LEAST_GAIN / 2}))
    assert row["tile"] == {"BLOCK": 64}
    assert row["ms"] == row["default_ms"] == 1.0


def test_wrong_results_are_discarded(run, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(Pretended({64: 1.0, 128: 0.1}, wrong=128))  # it writes nothing: what an earlier plan wrote doesn't count
    assert row["tile"] == {"BLOCK": 64}
    assert "discarded, 100.00% of the values differ" in capsys.readouterr().out


def test_what_cannot_be_launched_is_discarded(run, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(Pretended({64: 1.0, 128: 0.1}, too_large=128))
    assert row["tile"] == {"BLOCK": 64}
    assert "discarded, out of resource: shared memory" in capsys.readouterr().out


class Clock:
    """A clock that stands still unless it is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(tune, "time", SimpleNamespace(monotonic=lambda: self.now))


@pytest.mark.parametrize("budget", [10.0, 30.0, 100.0])
def test_budget_holds_compiling_timing_and_the_last_comparison(monkeypatch: pytest.MonkeyPatch, budget: float) -> None:
    clock = Clock(monkeypatch)
    kernel = Pretended({size: 64 / size for size in (32, 64, 128, 256, 512, 1024)})

    def compile_plans(subject: object, calls: object, target: object, plans: list[Plan]) -> list[None]:
        clock.now += 3.0
        return [None] * len(plans)

    def do_bench(call: object, warmup: float, rep: float, return_mode: str) -> float:
        clock.now += (warmup + rep) / 1000
        return kernel.milliseconds.get(kernel.block, 9.0)

    monkeypatch.setattr(tune, "compile_plans", compile_plans)
    monkeypatch.setattr(tune, "do_bench", do_bench)
    row = tune.tune(kernel.subject, CPU, TARGET, budget)
    assert clock.now <= budget
    assert row["ms"] < row["default_ms"]


def test_default_is_timed_when_time_is_up(run) -> None:
    row = run(Pretended({64: 1.0, 128: 0.1}), deadline=time.monotonic())
    assert row["tile"] == {"BLOCK": 64}
    assert row["default_ms"] == 1.0


# ---- the table ----


def make_row(kernel: str, block: int, ms: float, default_ms: float) -> dict:
    sizes = {"tile": {"BLOCK": block}, "num_warps": 8, "num_stages": 1}
    return {"kernel": kernel, "bucket": "all", **sizes, "ms": ms, "default_ms": default_ms}


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder in place of the package's tables."""
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    launch.read_plans.cache_clear()
    yield tmp_path
    launch.read_plans.cache_clear()


def test_table_is_read_by_launches(tuned: Path) -> None:
    assert launch.read_plans("some-gpu") == {}
    rows = [make_row("faster", 128, 0.5, 1.0), make_row("kept", 64, 1.0, 1.0)]
    tune.write(tuned / "some-gpu.json", "some-gpu", TARGET, rows)
    assert launch.read_plans("some-gpu") == {("faster", "all"): Plan({"BLOCK": 128}, 8, 1)}
    assert tune.read_rows(tuned / "some-gpu.json") == rows
    assert [path.name for path in tuned.iterdir()] == ["some-gpu.json"]
    assert json.loads((tuned / "some-gpu.json").read_text())["target"] == "cuda:90"


def test_merge_replaces_adds_and_drops(tuned: Path) -> None:
    subjects = [tune.Subject(name, "all", DEFAULT, []) for name in ("first", "second")]
    rows = tune.merge([make_row("second", 64, 1, 1), make_row("gone", 1, 1, 1)], make_row("first", 2, 1, 2), subjects)
    assert [row["kernel"] for row in rows] == ["first", "second"]
    rows = tune.merge(rows, make_row("second", 32, 1, 2), subjects)
    assert [row["tile"]["BLOCK"] for row in rows] == [2, 32]


# ---- the command ----


def test_command_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(60.0) == 2
    assert "tuning needs a CUDA device" in capsys.readouterr().err


def test_command_names_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tune.main(60.0, kernel="cross") == 2
    assert "expected one of conv_relu_pool2d_backward_input, " in capsys.readouterr().err


@pytest.fixture
def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended GPU, and two pretended kernels."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "gpu_name", lambda device: "some-gpu")
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: TARGET))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    subjects = [tune.Subject(name, "all", DEFAULT, []) for name in ("first", "second")]
    monkeypatch.setattr(tune, "find_subjects", lambda specimens: subjects)


def test_command_writes_after_each_bucket(some_gpu: None, monkeypatch: pytest.MonkeyPatch, tuned: Path) -> None:
    def tune_or_stop(subject: tune.Subject, *rest: object) -> dict:
        if subject.kernel == "second":
            raise KeyboardInterrupt
        return make_row(subject.kernel, 128, 0.5, 1.0)

    monkeypatch.setattr(tune, "tune", tune_or_stop)
    with pytest.raises(KeyboardInterrupt):
        tune.main(60.0)
    assert [row["kernel"] for row in tune.read_rows(tuned / "some-gpu.json")] == ["first"]


def test_command_writes_to_another_folder(
    some_gpu: None, monkeypatch: pytest.MonkeyPatch, tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(tune, "tune", lambda subject, *rest: make_row(subject.kernel, 128, 0.5, 1.0))
    folder = tmp_path_factory.mktemp("out") / "new"
    assert tune.main(60.0, folder) == 0
    assert [row["kernel"] for row in tune.read_rows(folder / "some-gpu.json")] == ["first", "second"]
    assert [*tuned.iterdir()] == []


def test_command_begins_nothing_that_the_budget_has_no_time_for(
    some_gpu: None, monkeypatch: pytest.MonkeyPatch, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    deadlines = []

    def until_its_deadline(subject: tune.Subject, device: object, target: object, deadline: float) -> dict:
        deadlines.append(deadline)
        clock.now = deadline
        return make_row(subject.kernel, 128, 0.5, 1.0)

    monkeypatch.setattr(tune, "tune", until_its_deadline)
    assert tune.main(22.0) == 0
    assert deadlines == [tune.SECONDS_OF_A_BUCKET]  # and 2 seconds are left
    assert "time is up; not tuned: second, all" in capsys.readouterr().out
    clock.now = 0.0
    assert tune.main(100.0) == 0
    assert deadlines[1:] == [50.0, 100.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_a_kernel_on_the_gpu(tuned: Path) -> None:
    subject = next(item for item in tune.find_subjects(SPECIMENS) if item.kernel == "cross_entropy_finish")
    target = triton.runtime.driver.active.get_current_target()
    row = tune.tune(subject, torch.device("cuda", 0), target, time.monotonic() + 20)
    assert 0 < row["ms"] <= row["default_ms"]
