"""The page holds what it is told, escaped, and a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.data import palette
from fastseg.training.evaluation_report import Example, error_map, write_report

CHROMIUM = shutil.which("chromium")


def write(file: Path) -> str:
    target, prediction = np.array([[0, 1], [255, 1]]), np.array([[0, 0], [1, 1]])
    example = Example("a&b.png", 0.25, {"errors": error_map(prediction, target, 255)})
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    names, curves = ["road", "R&D", "absent"], {"validation loss": [0.5, 0.25]}
    write_report(file, "best <best.safetensors>", names, palette(3), matrix, curves, [example])
    return file.read_text(encoding="utf-8")


def test_holds_what_it_is_told(tmp_path: Path) -> None:
    page = write(tmp_path / "report.html")
    text = re.sub(r"<[^>]*>", " ", page)
    assert "best &lt;best.safetensors&gt;" in page
    for expected in (
        "mean IoU 0.7750",
        "pixel accuracy 0.8750",
        "8 labelled pixels",
        "0.7500",
        "0.8000",
        " - ",
        "25.0",
    ):
        assert expected in text, expected
    assert "R&amp;D" in page
    assert "a&amp;b.png" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # nothing comes from elsewhere


def test_errors_are_red_and_what_is_ignored_is_gray() -> None:
    picture = error_map(np.array([[0, 0], [1, 1]]), np.array([[0, 1], [255, 1]]), 255)
    assert [picture.getpixel((x, y)) for y in (0, 1) for x in (0, 1)] == [
        (255, 255, 255), (214, 39, 40), (200, 200, 200), (255, 255, 255),
    ]  # fmt: skip


@pytest.mark.skipif(CHROMIUM is None, reason="chromium isn't installed")
def test_a_browser_shows_it(tmp_path: Path) -> None:
    write(tmp_path / "report.html")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600", "--hide-scrollbars"]
    quiet = ["--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    page = (tmp_path / "report.html").as_uri()
    subprocess.run([*command, *quiet, f"--screenshot={shot}", page], check=True, capture_output=True, timeout=60)
    colors = {color for _, color in Image.open(shot).convert("RGB").getcolors(1 << 24)}
    assert {tuple(color) for color in palette(3).tolist()} <= colors  # the classes' keys
    assert (214, 39, 40) in colors  # an error
