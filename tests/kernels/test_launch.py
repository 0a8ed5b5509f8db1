"""How Triton kernels are launched: plans, tiles, recorded launches."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")

from fastseg.kernels import cross_entropy, launch
from fastseg.kernels.launch import Plan
from fastseg.kernels.runs import runs_of
from fastseg.ops.losses.options import LossOptions

CPU = torch.device("cpu")
PLAN = Plan({"BLOCK_C": 4, "BLOCK_P": 1024})


@pytest.mark.parametrize(("work", "expected"), [(10**6, 1024), (1100, 512), (1, 16), (0, 16)])
def test_fit_shrinks_a_tile_until_all_multiprocessors_have_work(work: int, expected: int) -> None:
    assert launch.fit(PLAN, "BLOCK_P", 16, work, CPU).tile == {"BLOCK_C": 4, "BLOCK_P": expected}


@pytest.mark.parametrize(
    ("pixels", "classes", "expected"),
    [(600, 64, (4, 1024)), (512, 64, (8, 512)), (10, 64, (64, 64)), (10, 19, (32, 128)), (1, 3, (4, 1024))],
)
def test_fold_keeps_the_tile_as_large(pixels: int, classes: int, expected: tuple[int, int]) -> None:
    tile = launch.fold(PLAN, "BLOCK_P", pixels, "BLOCK_C", classes).tile
    assert (tile["BLOCK_C"], tile["BLOCK_P"]) == expected


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (256, 256, (128, 256, 2)),  # rows of whole tiles: as wide as can be
        (7, 7, (16, 1, 1)),
        (1, 300, (128, 1, 3)),
        (300, 1, (1, 3, 1)),
        (100, 130, (16, 13, 9)),  # 128 would take 200 tiles
    ],
    ids=str,
)
def test_tile_map_wastes_the_fewest_pixels(height: int, width: int, expected: tuple[int, int, int]) -> None:
    tiling = launch.tile_map(128, height, width)
    assert tuple(tiling) == expected
    assert tiling.down * (128 // tiling.width) >= height
    assert tiling.across * tiling.width >= width


def test_index_type_is_wide_from_31_bits_on() -> None:
    assert [launch.index_type(offset).primitive_bitwidth for offset in (0, 2**31 - 1, 2**31)] == [32, 32, 64]


def test_tuned_plans_are_read_from_the_gpus_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    row = {"kernel": "cross_entropy_forward", "bucket": "pixels-inner", "tile": PLAN.tile, "num_warps": 8,
           "num_stages": 2}  # fmt: skip
    (tmp_path / "some-gpu.json").write_text(json.dumps({"plans": [row]}))
    launch.read_plans.cache_clear()
    plans = launch.read_plans("some-gpu")
    assert plans == {("cross_entropy_forward", "pixels-inner"): Plan(PLAN.tile, 8, 2)}
    assert launch.read_plans("another-gpu") == {}
    launch.read_plans.cache_clear()


def record_forward(input: torch.Tensor) -> list[launch.Launch]:
    target = torch.empty(input[:, 0].shape, dtype=torch.int64, device="meta")
    statistics = torch.empty((2, *target.shape), device="meta")
    loss, total_weight = torch.empty((), device="meta"), torch.empty((), device="meta")
    with launch.recording() as launches:
        tensors = cross_entropy.ForwardTensors(input, target, None, loss, statistics, total_weight)
        cross_entropy.forward(tensors, LossOptions(-100, "mean"))
    return launches


def test_recording_tells_what_a_call_would_launch() -> None:
    launches = record_forward(torch.empty(2, 40, 64, 64, device="meta"))
    assert [launch.name for launch in launches] == ["cross_entropy_forward", "cross_entropy_finish"]
    assert launches[0].arguments["CLASSES"] == 40
    assert launches[0].bucket == "pixels-inner"


def test_a_trial_plan_replaces_the_default() -> None:
    input = torch.empty(8, 40, 512, 512, device="meta")
    default = record_forward(input)[0].plan
    with launch.trial("cross_entropy_forward", "pixels-inner", Plan({"BLOCK_C": 2, "BLOCK_P": 256, "STAGES": 2}, 2)):
        tried = record_forward(input)[0].plan
    assert (tried.num_warps, tried.tile["BLOCK_P"]) == (2, 256)
    assert record_forward(input)[0].plan == default


def test_equally_spaced_axes_become_one_run() -> None:
    shape, last = (4, 6, 8), torch.empty(4, 5, 6, 8).to(memory_format=torch.channels_last).stride()
    sliced = torch.empty(4, 6, 16)[..., ::2].stride()
    runs = runs_of(shape, [(last[0], last[2], last[3]), (48, 8, 1)])
    assert (runs.length, runs.count, runs.steps) == (4 * 6 * 8, 1, [5, 1])  # channels_last: one run of all pixels
    runs = runs_of(shape, [(240, 8, 1), (48, 8, 1)])
    assert (runs.length, runs.count, runs.sizes) == (48, 4, (4,))  # NCHW: one of each image
    runs = runs_of(shape, [sliced, (48, 8, 1)])
    assert (runs.length, runs.count, runs.steps) == (4 * 6 * 8, 1, [2, 1])
    runs = runs_of(shape, [(100, 10, 1), (48, 8, 1)])
    assert (runs.length, runs.count, runs.sizes) == (8, 24, (4, 6))  # a crop: one of each row


# ---- replayed launchers ----


class Kernel:
    """As much of a Triton kernel as launches need; keeps what was launched how."""

    arg_names = ("output", "input", "memory", "size", "BLOCK")
    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.compiled_calls, self.replayed_calls = [], []

    def __getitem__(self, grid: tuple[int]) -> object:
        def run(**arguments: object) -> "Kernel":
            self.compiled_calls.append((grid, arguments))
            return self

        return run

    def run(self, *arguments: object) -> None:
        self.replayed_calls.append(arguments)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors are treated as a GPU's."""
    monkeypatch.setattr(launch, "_compiles", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    active = SimpleNamespace(get_current_stream=lambda device: "stream")
    monkeypatch.setattr(launch.triton.runtime, "driver", SimpleNamespace(active=active))


def make_launcher(kernel: Kernel, decisions: list[object]) -> object:
    @launch.replayed
    def launcher(tensors: tuple[torch.Tensor, ...], options: object) -> torch.Tensor:
        decisions.append(options)
        input, output = tensors
        memory = launch.scratch((2, len(input)), torch.float64, input.device)
        arguments = {"input": input, "output": output, "memory": memory, "size": len(input)}
        launch.launch(kernel, "all", Plan({"BLOCK": 64}), len(input), arguments)
        return memory

    return launcher


def test_a_replay_launches_what_the_first_call_did_on_its_own_tensors(on_a_gpu: None) -> None:
    kernel, decisions = Kernel(), []
    launcher = make_launcher(kernel, decisions)
    first = torch.empty(5), torch.empty(5)
    launcher(first, "option")
    assert kernel.compiled_calls[0][0] == (5,)
    input, output = torch.empty(5), torch.empty(5)
    memory = launcher((input, output), "option")
    assert decisions == ["option"]
    assert (memory.shape, memory.dtype) == ((2, 5), torch.float64)
    addresses = output.data_ptr(), input.data_ptr(), memory.data_ptr()
    head = (5, 1, 1, "stream", "function", "metadata", None, None, None)
    assert kernel.replayed_calls == [(*head, *addresses, 5, 64)]


STORAGE = torch.empty(100)
CHANGES = {
    "option": ((STORAGE[:5], STORAGE[:5]), "another"),
    "shape": ((STORAGE[:6], STORAGE[:5]), "option"),
    "strides": ((STORAGE[:10:2], STORAGE[:5]), "option"),
    "dtype": ((STORAGE[:5], STORAGE[:5].double()), "option"),
    "alignment": ((STORAGE[1:6], STORAGE[:5]), "option"),
    "two tensors for one": ((STORAGE[:5], STORAGE[20:25]), "option"),
}


@pytest.mark.parametrize(("tensors", "option"), CHANGES.values(), ids=CHANGES)
def test_another_kind_of_call_is_decided_anew(on_a_gpu: None, tensors: tuple[torch.Tensor, ...], option: str) -> None:
    kernel, decisions = Kernel(), []
    launcher = make_launcher(kernel, decisions)
    launcher((STORAGE[:5], STORAGE[:5]), "option")
    launcher(tensors, option)
    assert len(decisions) == 2
    assert kernel.replayed_calls == []


def test_replays_are_forgotten_before_they_fill_the_memory(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_REPLAYS", 2)
    kernel, decisions = Kernel(), []
    launcher = make_launcher(kernel, decisions)
    for option in (0, 1, 0, 1, 2, 0):
        launcher((STORAGE[:5], STORAGE[:5]), option)
    assert decisions == [0, 1, 2, 0]


def test_trials_and_recordings_are_never_replayed(on_a_gpu: None) -> None:
    kernel, decisions = Kernel(), []
    launcher = make_launcher(kernel, decisions)
    launcher((STORAGE[:5], STORAGE[:5]), "option")
    with launch.trial("another", "all", Plan({"BLOCK": 8})):
        launcher((STORAGE[:5], STORAGE[:5]), "option")
    with launch.recording() as launches:
        launcher((STORAGE[:5], STORAGE[:5]), "option")
    assert len(decisions) == 3
    assert [item.arguments["size"] for item in launches] == [5]
    assert len(kernel.compiled_calls) == 2
