"""examples/whole_job.py on generated images: every step's files are there, and the last step's check holds."""

import runpy
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="typer isn't installed: it comes with the extra [train]")
from fastseg.data import ShapesDataset

EXAMPLE = Path(__file__).parents[2] / "examples" / "whole_job.py"
TRAINING = [
    "--model", "fcn", "--widths", "4,8", "--size", "24x28", "--lr", "auto", "--epochs", "1", "--batch-size", "4",
    "--device", "cpu",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.onnx's own
def test_the_whole_job_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    if not EXAMPLE.exists():
        pytest.skip("examples/ is part of a checkout, not of the installed package")
    for package in ("captum", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    data, out = tmp_path / "data", tmp_path / "out"
    ShapesDataset(10, (30, 34)).write(data)
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(data), str(out), "--class", "class 0", *TRAINING])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    images = sorted(path.stem for path in out.glob("predictions/*_overlay.png"))
    assert len(images) == 2  # the validation split
    expected = ["fastseg/lr_find.png", "fastseg/curves.png", "eager/best.safetensors", "curves.png"]
    for name in [*expected, "report/report.html", "explanations/explanations.json", "network.onnx"]:
        assert (out / name).is_file(), name
    assert capsys.readouterr().out.count("ONNX Runtime and PyTorch agree on") == 2
