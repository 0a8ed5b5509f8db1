"""A small data set and a network trained on it, for all commands."""

from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from fastseg.cli.runner import run
from fastseg.data import ShapesDataset

SMALL = ["--epochs", "1", "--batch-size", "4", "--widths", "4,8", "--device", "cpu"]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    ShapesDataset(10, (30, 34)).write(root)  # sides that neither network divides
    return root


@pytest.fixture(scope="session")
def trained(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on ``shapes``, with images resized and a test split."""
    out = tmp_path_factory.mktemp("run")
    arguments = ["--data", str(shapes), "--out", str(out), "--size", "24x28", "--test-fraction", "0.2"]
    assert run(["train", *arguments, *SMALL]) == 0
    return out
