"""An evaluation as one HTML page, which opens without a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from fastseg.metrics import scores
from fastseg.training.plots import save_panels

WIDTH = 480  # of the examples' pictures, in pixels

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .6rem; text-align: right; border: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.matrix td { min-width: 3rem; }
.scroll { overflow-x: auto; }
.bar { background: #4878a8; height: .9rem; }
.key { display: inline-block; width: .9rem; height: .9rem; margin-right: .3rem; vertical-align: middle; }
p .key:not(:first-child) { margin-left: 1rem; }
figure { display: inline-block; margin: .3rem; } figure img { max-width: 100%; width: 22rem; }
"""


class Example(NamedTuple):
    """One image of the worst ones.

    Attributes:
        name: The image's file.
        mean_iou: Of this image alone.
        pictures: What is shown of it side by side, with captions: the truth, the prediction, the errors.
    """

    name: str
    mean_iou: float
    pictures: dict[str, Image.Image]


def error_map(prediction: np.ndarray, target: np.ndarray, ignore_index: int) -> Image.Image:
    """Red where a pixel has another class than the truth, gray where the truth is ignored, white else."""
    colors = np.full((*target.shape, 3), 255, dtype=np.uint8)
    colors[prediction != target] = (214, 39, 40)
    colors[target == ignore_index] = (200, 200, 200)
    return Image.fromarray(colors)


def write_report(
    file: str | Path,
    title: str,
    class_names: Sequence[str],
    palette: np.ndarray,
    matrix: Tensor,
    curves: Mapping[str, Sequence[float]],
    worst: Sequence[Example],
) -> None:
    """Write the page.

    Args:
        file: HTML file to write.
        title: Its heading: checkpoint, data and split.
        class_names: A name for each class.
        palette: The classes' colours, uint8 ``[C, 3]``.
        matrix: int64 ``[C, C]``, from `fastseg.metrics.confusion_matrix`.
        curves: Values epoch by epoch, by name; each gets a chart.
        worst: The images with the lowest scores, the worst first.
    """
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _summary(matrix),
        "<h2>Classes</h2>",
        _classes(class_names, palette, matrix),
        "<h2>Confusion matrix</h2><p>Rows are the truth, columns the prediction; in percent of the row.</p>",
        _confusion(class_names, matrix),
    ]
    if curves:
        parts += ["<h2>Training</h2>", _charts(curves)]
    if worst:
        parts += ["<h2>Worst images</h2>", _legend(class_names, palette), *map(_example, worst)]
    page = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>"
    )
    Path(file).write_text(page, encoding="utf-8")


def _summary(matrix: Tensor) -> str:
    found = scores(matrix)
    return (
        f"<p><b>mean IoU {found.mean_iou:.4f}</b>, mean Dice {found.mean_dice:.4f}, "
        f"pixel accuracy {found.pixel_accuracy:.4f}, {int(matrix.sum()):,} labelled pixels</p>"
    )


def _classes(class_names: Sequence[str], palette: np.ndarray, matrix: Tensor) -> str:
    found, pixels = scores(matrix), matrix.sum(1).tolist()
    rows = [
        f"<tr><td>{_key(color)}{html.escape(name)}</td><td>{_number(iou)}</td>"
        f'<td><div class="bar" style="width:{0 if iou != iou else 10 * iou:.2f}rem"></div></td>'
        f"<td>{_number(dice)}</td><td>{count:,}</td></tr>"
        for name, color, iou, dice, count in zip(class_names, palette, found.iou, found.dice, pixels, strict=True)
    ]
    head = "<tr><th>class</th><th>IoU</th><th></th><th>Dice</th><th>pixels</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _confusion(class_names: Sequence[str], matrix: Tensor) -> str:
    shares = (matrix.double() / matrix.sum(1, keepdim=True).clamp(min=1)).tolist()
    head = "".join(f"<th>{html.escape(name)}</th>" for name in class_names)
    rows = [
        f"<tr><th>{html.escape(name)}</th>"
        + "".join(
            f'<td style="background:rgba({"72,120,168" if row == column else "214,39,40"},{share:.3f})">'
            f"{100 * share:.1f}</td>"
            for column, share in enumerate(of_row)
        )
        + "</tr>"
        for row, (name, of_row) in enumerate(zip(class_names, shares, strict=True))
    ]
    return f'<div class="scroll"><table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _charts(curves: Mapping[str, Sequence[float]]) -> str:
    picture = io.BytesIO()
    panels = {name: (range(1, len(values) + 1), {name: values}) for name, values in curves.items()}
    save_panels(panels, "epoch", picture)
    return _image(picture.getvalue(), ", ".join(curves))


def _legend(class_names: Sequence[str], palette: np.ndarray) -> str:
    return "<p>" + "".join(
        f"{_key(color)}{html.escape(name)}" for name, color in zip(class_names, palette, strict=True)
    )


def _example(example: Example) -> str:
    figures = []
    for caption, picture in example.pictures.items():
        height = max(round(picture.height * WIDTH / picture.width), 1)
        data = io.BytesIO()
        picture.resize((WIDTH, height), Image.Resampling.NEAREST).save(data, format="PNG")
        figures.append(f"<figure>{_image(data.getvalue(), caption)}<figcaption>{caption}</figcaption></figure>")
    heading = f"<h3>{html.escape(example.name)}: mean IoU {_number(example.mean_iou)}</h3>"
    return heading + "".join(figures)


def _image(png: bytes, alternative: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/png;base64,{data}">'


def _key(color: np.ndarray) -> str:
    return f'<span class="key" style="background:rgb({",".join(map(str, color.tolist()))})"></span>'


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"
