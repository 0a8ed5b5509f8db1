"""What `import fastseg` does in a fresh process; a checkout that isn't built says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseg

ROOT = Path(__file__).parents[1]
MODEL = """
import fastseg, torch
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
compiled = torch.compile(model, backend="fastseg", options={"inner": "eager"})
x = torch.randn(1, 3, 8, 8)
assert torch.equal(compiled(x), model(x))
print(fastseg.report(compiled))
"""


def unbuilt(code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that finds this checkout's fastseg first: -S leaves out what an editable install adds."""
    environment = os.environ | {"PYTHONPATH": str(Path(torch.__file__).parents[1])}
    return subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_an_unbuilt_checkout_warns_once_and_its_report_counts_nothing() -> None:
    process = unbuilt(MODEL)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("RuntimeWarning") == 1
    assert f"RuntimeWarning: this fastseg is the checkout at {ROOT}, which isn't built" in process.stderr
    report = process.stdout.splitlines()
    assert report[0] == "fastseg: nothing replaced, 1 left: the model runs as it was"
    assert "the operator would run as plain PyTorch (ModuleNotFoundError: No module named 'fastseg._C')" in report[2]


def built(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process that finds the installed fastseg."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)


def test_a_built_one_is_silent_and_needs_no_gpu_and_nothing_that_is_slow_to_import(tmp_path: Path) -> None:
    slow = ("triton", "torch._dynamo", "torch._inductor")
    code = f"import fastseg, sys, torch; print(torch.ops.fastseg.cross_entropy.default, {{*{slow}}} & {{*sys.modules}})"
    process = built(code, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (process.returncode, process.stderr, process.stdout) == (0, "", "fastseg.cross_entropy.default set()\n")


@pytest.mark.parametrize("name", ["portable", pytest.param("avx2", marks=pytest.mark.full)])
def test_the_environment_chooses_the_instruction_set(name: str, tmp_path: Path) -> None:
    process = built("import fastseg; print(fastseg.info())", tmp_path, FASTSEG_CPU_ISA=name)
    assert f"'cpu_isa': '{name}'" in process.stdout or name not in fastseg.info()["cpu_isas"]


@pytest.mark.full  # the command says it: tests/cli/test_cli.py
def test_an_instruction_set_that_there_is_not_is_an_error(tmp_path: Path) -> None:
    process = built("import fastseg; print(fastseg.info())", tmp_path, FASTSEG_CPU_ISA="sse9")
    assert "sse9" in process.stderr
    assert "portable" in process.stderr
