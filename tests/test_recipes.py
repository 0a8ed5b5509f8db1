"""The recipes of the documentation: each runs as it stands, and the backend finds what its comments say."""

import ast
import importlib.util
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from fastseg._torchvision import prepare_torchvision
from fastseg.fusion import backend

RECIPES = {path.stem: path for path in sorted(Path(__file__).parents[1].glob("docs/recipes/*.py"))}
# Third-party models take their time; .ci/run asks for those recipes whose packages it has.
QUICK = {"export_onnx"}
# What the backend puts in, of each recipe that prints its report.
FOUND = {
    "monai_unet": {"conv2d"},
    "smp_unet": {"conv2d", "relu_pool2d"},
    "torchvision_step": {"upsample_cross_entropy"},
    "transformers_trainer": {"upsample_cross_entropy"},
}


def imported(path: Path) -> set[str]:
    """The packages that a script imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


@pytest.mark.filterwarnings("ignore")  # the other libraries' own
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.models]) for name in RECIPES]
)
def test_a_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [package for package in imported(RECIPES[name]) if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install '.[models,bench]'")
    prepare_torchvision()
    monkeypatch.chdir(tmp_path)  # what a recipe writes
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)  # OpenVINO would tell of its use
    # Inductor takes its time, and has tests of its own.
    monkeypatch.setattr(backend, "_missing_compiler", lambda inputs: "left out by a test")
    torch._dynamo.reset()
    values = runpy.run_path(str(RECIPES[name]))
    assert math.isfinite(values.get("loss", 0.0))
    found = {replacement.operator for replacement in values["report"].replaced} if "report" in values else set()
    assert found >= FOUND.get(name, set())
