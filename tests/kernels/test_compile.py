"""The Triton kernels, compiled ahead of time: no GPU is needed, but Triton's compiler is."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from fastseg._native import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")
if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set, and interpreted kernels can't be compiled", allow_module_level=True)

from fastseg.kernels import compile, launch  # noqa: E402
from fastseg.kernels.compile import Row  # noqa: E402
from fastseg.kernels.launch import Plan  # noqa: E402
from fastseg.kernels.specimen import Specimen, record  # noqa: E402
from fastseg.kernels.specimens import SPECIMENS  # noqa: E402

HOPPER = compile.parse_target("cuda:90")
HOPPER_SHARED_BYTES = 227 * 1024  # of a program, of a multiprocessor's 228 KiB (CUDA C++ programming guide)
HALF_TYPES = {"fp16", "bf16"}
DTYPE_CLASSES = {"bf16": "half", "fp16": "half", "fp32": "float32", "fp64": "float64"}


A_FEW = [  # a specimen of each launcher
    next(item for item in SPECIMENS if item.name.startswith(f"{operator} ") and item.name.endswith(f" {launcher}"))
    for operator, launcher in (
        ("cross_entropy", "forward"),
        ("cross_entropy", "backward"),
        ("conv_relu_pool2d", "forward"),
        ("conv_relu_pool2d", "backward_weight"),
        ("conv_relu_pool2d", "backward_input"),
        ("relu_pool2d", "forward"),
        ("relu_pool2d", "backward"),
        ("upsample_cross_entropy", "forward"),
        ("upsample_cross_entropy", "backward"),
        ("upsample_argmax", "forward"),
        ("upsample_confusion_matrix", "forward"),
        ("upsample_threshold", "forward"),
        ("upsample_mask_argmax", "forward"),
        ("upsample_sigmoid_sums", "forward"),
        ("upsample_sigmoid_sums", "backward"),
    )
]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest) -> list[Row]:
    """Each kernel for each class of dtypes, compiled for Hopper; with ``--full`` every configuration."""
    jobs = compile.default_jobs(HOPPER) + compile.tuned_jobs(HOPPER)
    if request.config.getoption("strength"):
        jobs = list({(job.kernel, dtypes(job)): job for job in reversed(jobs)}.values())
    return list(compile.compile_jobs(jobs))


def dtypes(job: compile.Job) -> str:
    """The class of a kernel's tensors: of half precision, float32 or float64, in which some keep float32's sums."""
    kinds = str(job.signature)
    return next(name for kind, name in DTYPE_CLASSES.items() if f"*{kind}" in kinds)


def test_every_configuration_compiles(rows: list[Row]) -> None:
    assert [(row.kernel, row.specimen, row.error) for row in rows if row.error is not None] == []


def test_every_kernel_that_is_launched_is_compiled(rows: list[Row]) -> None:
    modules = [import_module(f"fastseg.kernels.{path.stem}") for path in Path(launch.__file__).parent.glob("*.py")
               if not path.stem.startswith("__")]  # fmt: skip
    sources = {name: value.src for module in modules for name, value in vars(module).items()
               if isinstance(value, triton.JITFunction)}  # fmt: skip
    called = {name for name in sources for other, source in sources.items()
              if name != other and re.search(rf"\b{name}\(", source)}  # fmt: skip
    launched = {*sources} - called
    assert {row.kernel for row in rows} == launched


def test_no_default_plan_spills(rows: list[Row]) -> None:
    spilling = [row for row in rows if row.origin == compile.DEFAULT and row.spilled_bytes > 0]
    assert not spilling, "\n" + compile.table(spilling)


def test_shared_memory_suffices(rows: list[Row]) -> None:
    too_large = [row for row in rows if row.shared_bytes > HOPPER_SHARED_BYTES]
    assert not too_large, "\n" + compile.table(too_large)


def test_convolutions_of_half_types_use_tensor_cores(rows: list[Row]) -> None:
    convolutions = [row for row in rows if row.kernel.startswith("conv_relu_pool2d") and HALF_TYPES & {*row.types}]
    without = [row for row in convolutions if not row.matrix_instructions]
    assert convolutions
    assert not without, "\n" + compile.table(without)


def test_forward_convolutions_use_whole_warp_groups(rows: list[Row]) -> None:
    forward = [row for row in rows if row.kernel == "conv_relu_pool2d_forward" and row.types[0] in HALF_TYPES]
    without = [row for row in forward if "wgmma" not in row.matrix_instructions]
    assert forward
    assert not without, "\n" + compile.table(without)


@pytest.mark.parametrize(("target", "instruction"), [("cuda:80", "mma"), ("hip:gfx942", "mfma")])
def test_other_targets(request: pytest.FixtureRequest, target: str, instruction: str) -> None:
    families = {specimen.name.split("_")[0]: specimen for specimen in reversed(A_FEW)}  # of each its first
    specimens = families.values() if request.config.getoption("strength") else A_FEW
    rows = list(compile.compile_jobs(compile.default_jobs(compile.parse_target(target), specimens)))
    assert {row.kernel.split("_")[0] for row in rows} == {"cross", "conv", "relu", "upsample"}
    assert [(row.kernel, row.error) for row in rows if row.error is not None] == []
    assert all(row.registers > 0 for row in rows)
    convolutions = [row for row in rows if row.kernel.startswith("conv_relu_pool2d")]
    assert all(row.matrix_instructions.keys() == {instruction} for row in convolutions)


class Hopper:
    """As much of a driver as Triton asks of one to compile without launching."""

    def get_current_target(self) -> object:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize("specimen", A_FEW[:2], ids=lambda specimen: specimen.name.split()[-1])
def test_what_is_compiled_is_what_would_be_launched(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> None:
    item = record(specimen)[0]
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    launched = item.kernel.warmup(**item.arguments, **item.plan.options("cuda"), grid=(1,))
    item.kernel.device_caches.clear()  # what it remembers of the driver
    job = compile.make_job(item, HOPPER, specimen.name)
    assert compile.compile_kernel(job).hash == launched.hash


@pytest.mark.parametrize("max_registers", [None, 24])
def test_too_few_registers_are_spilled(max_registers: int | None) -> None:
    specimen = next(item for item in A_FEW if item.name.startswith("upsample_argmax "))
    (job,) = compile.default_jobs(HOPPER, [specimen])
    row = compile.compile_job(job._replace(options={**job.options, "maxnreg": max_registers}))
    assert (row.spilled_bytes > 0) == (max_registers is not None)


def test_types_and_constants_are_those_of_the_call() -> None:
    specimen = next(item for item in SPECIMENS if "8x19x512x512 bfloat16 float32" in item.name)
    (job, *_) = compile.default_jobs(HOPPER, [specimen])
    assert job.signature["input"] == "*bf16"
    assert job.signature["target"] == "*fp32"
    assert job.signature["input_pixel"] == "constexpr"  # a 1
    assert job.signature["ignore_index"] == "i32"  # never specialised
    assert job.attributes[(list(job.signature).index("input"),)] == [["tt.divisibility", 16]]
    assert ["tt.divisibility", 16] not in job.attributes.get((list(job.signature).index("ignore_index"),), [])


def test_tuned_plans_are_compiled_for_their_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = {"kernel": "cross_entropy_finish", "bucket": "all", "tile": {"BLOCK": 512}, "num_warps": 2, "num_stages": 1}
    (tmp_path / "some-gpu.json").write_text(json.dumps({"target": "cuda:90", "plans": [plan]}))
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    launch.read_plans.cache_clear()
    try:
        jobs = compile.tuned_jobs(HOPPER, A_FEW[:2])
        assert [(job.kernel, job.origin, job.plan) for job in jobs] == [
            ("cross_entropy_finish", "some-gpu", Plan({"BLOCK": 512}, num_warps=2))
        ]
        assert compile.tuned_jobs(compile.parse_target("cuda:80"), A_FEW[:2]) == []
    finally:
        launch.read_plans.cache_clear()


# ---- the command ----


def test_command_writes_what_it_prints(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert compile.main("cuda:90", tmp_path / "rows.json", A_FEW[:1]) == 0
    written = json.loads((tmp_path / "rows.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    assert written["target"] == "cuda:90"
    assert [row["kernel"] for row in written["rows"]] == [line.split()[0] for line in lines[2:]]
    assert all(str(row["registers"]) in line.split() for row, line in zip(written["rows"], lines[2:], strict=True))


def test_command_fails_where_a_kernel_does_not_compile(capsys: pytest.CaptureFixture[str]) -> None:
    with launch.trial("cross_entropy_finish", "all", Plan({"BLOCK": 3})):  # no power of two
        assert compile.main("cuda:90", None, A_FEW[:1]) == 1
    printed = capsys.readouterr()
    assert "FAILED: CompilationError" in printed.out
    assert "cross_entropy_finish (all; " in printed.err


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_90", "hip:90", "cpu:1"])
def test_command_refuses_unknown_targets(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compile.main(target, None, A_FEW[:1]) == 2
    assert f"target must be like 'cuda:90' or 'hip:gfx942', but got {target!r}" in capsys.readouterr().err


def test_command_refuses_to_compile_interpreted_kernels() -> None:
    command = [sys.executable, "-m", "fastseg.kernels", "compile", "--target", "cuda:90"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


def test_table_marks_spills_of_default_plans() -> None:
    row = Row("kernel", "all", compile.DEFAULT, {"BLOCK": 64}, 4, 1, {}, {"input": "*fp16/16"}, "call", 255, 8)
    tuned = dataclasses.replace(row, origin="some-gpu")
    lines = compile.table([row, tuned]).splitlines()
    assert lines[1].endswith("SPILLS")
    assert "SPILLS" not in lines[2]
