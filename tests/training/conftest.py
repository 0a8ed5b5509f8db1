"""A small data set, and runs without pictures."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="Pillow isn't installed: it comes with the extra [train]")
pytest.importorskip("safetensors", reason="safetensors isn't installed: it comes with the extra [train]")
from PIL import Image

from fastseg.data import ShapesDataset
from fastseg.training import run
from tests.training.runs import IGNORED


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of 32x32 pixels; every other mask has ignored pixels, so that batches count differently."""
    root = tmp_path_factory.mktemp("shapes")
    ShapesDataset(12, (32, 32)).write(root)
    for path in sorted((root / "masks").iterdir())[::2]:
        with Image.open(path) as file:
            labels = np.array(file)
        labels[:16, :20] = IGNORED
        Image.fromarray(labels).save(path)
    return root


@pytest.fixture
def without_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes ten times as long as these runs."""
    monkeypatch.setattr(run, "save_history", lambda *_: None)
