"""Where fastseg is imported from: a checkout that isn't built says so."""

import os
import subprocess
import sys
from pathlib import Path

import torch

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


def test_a_built_one_is_silent(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", "import fastseg"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0, "")


def test_import_needs_no_gpu_and_no_triton() -> None:
    code = "import fastseg, sys, torch; assert 'triton' not in sys.modules; torch.ops.fastseg.upsample_argmax.default"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
