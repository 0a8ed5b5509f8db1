"""examples/predict_with_ray_data.py on a local cluster, where ray is installed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "predict_with_ray_data.py"


@pytest.mark.models
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray: pip install 'ray[data]'")
@pytest.mark.skipif(not EXAMPLE.exists(), reason="examples/ is part of a checkout, not of the installed package")
def test_images_are_segmented_on_a_cluster(trained: Path, shapes: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_text("no image")
    places = [trained / "best.safetensors", tmp_path / "out", shapes / "images", broken]
    finished = subprocess.run(
        [sys.executable, EXAMPLE, *map(str, places), "--batch-size", "4"], capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert finished.returncode == 1
    assert f"{broken}: can't be read as an image" in finished.stderr
    assert len(list((tmp_path / "out").glob("*_overlay.png"))) == 10
