"""``fastseg explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import numpy as np
from matplotlib import colormaps
from PIL import Image
from rich.console import Console
from typer import Argument, Option

from fastseg.cli import options
from fastseg.data import Normalize, read_image
from fastseg.data.pictures import to_picture
from fastseg.explanation import Method
from fastseg.explanation import explain as attribute
from fastseg.training import ConfigError, load_checkpoint
from fastseg.training.devices import choose_device
from fastseg.training.prediction import image_files


def explain(
    images: Annotated[list[Path], Argument(help="Image files, and folders of them.")],
    checkpoint: options.Checkpoint,
    target: Annotated[str, Option("--class", help="Name or number of the class.")],
    out: Annotated[Path, Option(help="Folder for STEM_METHOD.png and explanations.json.")],
    method: Annotated[Method, Option(help="How attributions are made.")] = "gradcam",
    device: options.Device = "auto",
    model: options.Function = None,
) -> None:
    """Show where a network looks for a class: attribution maps over the images, and how much lies in the class."""
    network, metadata = load_checkpoint(checkpoint, backend="eager", model=model)  # compiling takes longer than this
    label = _label(target, metadata.class_names)
    place = choose_device(device)
    network.to(place).eval()
    normalize = Normalize(metadata.mean, metadata.std)
    out.mkdir(parents=True, exist_ok=True)
    console, numbers = Console(), {}
    for file in image_files(images):
        image = read_image(file, metadata.size)
        seen = normalize(image).to(place)
        inside = network.predict(seen[None])[0] == label
        if not inside.any():
            console.print(f"{file}: no {metadata.class_names[label]} is found", soft_wrap=True, highlight=False)
            continue
        try:
            strength = attribute(network, seen, label, method).abs().cpu().numpy()
        except (ImportError, ValueError) as error:
            raise ConfigError(str(error)) from error
        share = float(strength[inside.cpu().numpy()].sum() / max(strength.sum(), 1e-12))
        numbers[str(file)] = {"class": metadata.class_names[label], "method": method, "share_inside": share}
        heat = colormaps["inferno"](strength / max(strength.max(), 1e-12))[..., :3]
        shown = Image.fromarray((255 * heat).astype(np.uint8))
        Image.blend(to_picture(image), shown, 0.6).save(out / f"{file.stem}_{method}.png")
        console.print(f"{file}: {share:.1%} of the attribution lies in the class", soft_wrap=True, highlight=False)
    (out / "explanations.json").write_text(json.dumps(numbers, indent=1))


def _label(target: str, class_names: tuple[str, ...]) -> int:
    if target in class_names:
        return class_names.index(target)
    if target.isdecimal() and int(target) < len(class_names):
        return int(target)
    raise ConfigError(f"class must be one of {', '.join(class_names)}, or its number, but it is {target!r}")
