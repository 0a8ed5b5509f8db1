"""Models that others wrote: a training step and a prediction by eager PyTorch, torch.compile and backend="fastseg".

``python -m benchmarks.models_of_others --out FILE.md --readme README.md`` measures all of `CASES` and writes the
tables: to FILE.md, and their summary between two marks of the README as well. ``--only NAME`` (as often as wanted)
measures some; with ``--json FILE``, what is measured replaces its old lines in FILE, and the tables are written of all
that FILE holds. It needs the extra ``models``: a model whose library isn't installed is listed as not measured, with
the reason, and no table is written where none could be measured.

A training step is the loss and the gradients of all parameters, without the optimizer's part; a prediction goes from
images to class numbers, in evaluation, under ``no_grad``. Both are measured as the rest of the suite is (`suite`):
verified against a float64 truth first, then timed in interleaved rounds. Each model has a process of its own, so that
what one leaves behind doesn't count in another's memory.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info
from pytest_benchmark.utils import get_commit_info
from torch import Tensor, nn

import fastseg
from benchmarks import models_of_others_report as report
from benchmarks.bench_models import ModelCase
from benchmarks.devices import CPU
from benchmarks.models_of_others_report import STEP, TIMINGS
from benchmarks.others import (
    LOGITS,
    OWN_LOSS,
    TWO_HEADS,
    Builder,
    Use,
    basic_unet,
    made,
    segformer,
    smp,
    torchvision,
    upernet,
)
from benchmarks.suite import COMPILE, COMPILERS, FASTSEG, Effort, Job, Measured, verify_and_time

INSTALL = "pip install '.[models]'"

# Of one function: what breaks TorchDynamo's graph is compiled apart for each module that calls it, for each contestant
# and each mode. Beyond torch's own limit, 8, they would run without a compiler.
ENOUGH_GRAPHS = 64

# A step of these models takes a second, not a millisecond.
EFFORT = Effort(seconds=6, least_rounds=5, most_rounds=30)


class Called(nn.Module):
    """A model's loss, or its prediction where there are no labels, as its users write them."""

    def __init__(self, model: nn.Module, use: Use) -> None:
        super().__init__()
        self.model, self.use = model, use

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The loss, or the classes."""
        if labels is None:
            return self.use.logits(self.model, images).argmax(1)
        return self.use.loss(self.model, images, labels)


@dataclass(frozen=True)
class OtherCase(ModelCase):
    """A model of another library on images of a shape.

    Args:
        package: Its library.
        builder: Makes it.
        use: How it is called.
        classes: Number of classes.
        inductor: Options that Inductor needs to compile it, for torch.compile and the backend alike.
    """

    package: str
    builder: Builder
    use: Use
    classes: int
    inductor: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Library and model."""
        return self.network

    @property
    def layouts(self) -> tuple[str, ...]:
        """As the libraries make them."""
        return ("nchw",)

    @property
    def fullgraph(self) -> bool:
        """Some do what TorchDynamo can't capture, between graphs."""
        return False

    @property
    def deployable(self) -> bool:
        """OpenVINO isn't asked."""
        return False

    def missing(self) -> str | None:
        """Why it can't be measured, or None."""
        return None if importlib.util.find_spec(self.package) else f"needs {self.package}: {INSTALL}"

    def job(self, fused: bool, layout: str, training: bool, dtype: torch.dtype | None = None) -> Job:
        """The loss with its gradients, or the prediction."""
        if fused and dtype is None:
            return self.fused_step if training else self.fused_prediction
        model = Called(self.made(dtype), self.use)
        images = self.device.make(self.images, dtype)
        # transformers' models prepare themselves in their first call, in a way that breaks TorchDynamo's graphs.
        with torch.no_grad():
            model.eval()(images)
        model.train(training)
        if not training:
            return Job(model, (images,))
        labels = self.device.make_labels(self.labels, self.classes, seed=1)
        return Job(model, (images, labels), tuple(model.parameters()))

    @functools.cached_property
    def fused_step(self) -> Job:
        """A training step through the backend: one, compiled once."""
        return self._fused(training=True)

    @functools.cached_property
    def fused_prediction(self) -> Job:
        """A prediction through the backend."""
        return self._fused(training=False)

    def _fused(self, training: bool) -> Job:
        job = self.job(False, "nchw", training)
        return job._replace(function=torch.compile(job.function, dynamic=False, backend="fastseg"))

    def made(self, dtype: torch.dtype | None) -> nn.Module:
        """The model, with the same weights every time."""
        return made(self.builder, self.classes).to(self.device.name, dtype or self.device.dtype)

    def judged(self, results: list[Tensor]) -> list[Tensor]:
        """All gradients as one: in a deep network those of some layers are next to nothing but roundings."""
        judged = super().judged(results)
        return judged if len(judged) == 1 else [judged[0], torch.cat([gradient.flatten() for gradient in judged[1:]])]

    @functools.cached_property
    def logits(self) -> Tensor:
        """The true logits, at the images' size."""
        with torch.no_grad():
            return self.use.logits(self.made(torch.float64).eval(), self.device.make(self.images, torch.float64))


# Inductor of torch 2.13 makes a gradient of replication_pad2d channels_last, and then refuses it.
_NO_CHANNELS_LAST = (("layout_optimization", False),)
_SMP, _VISION, _HUGGING = "segmentation_models_pytorch", "torchvision", "transformers"
_RESNET18 = upernet((64, 128, 256, 512), 2, 128)

CASES = [
    OtherCase("smp.Unet-resnet18", (2, 3, 256, 256), _SMP, smp("Unet", "resnet18"), LOGITS, 21),
    OtherCase("smp.Unet-vgg11", (2, 3, 192, 192), _SMP, smp("Unet", "vgg11"), LOGITS, 21),
    OtherCase("smp.FPN-resnet18", (2, 3, 256, 256), _SMP, smp("FPN", "resnet18"), LOGITS, 21),
    OtherCase("smp.FPN-vgg11", (2, 3, 192, 192), _SMP, smp("FPN", "vgg11"), LOGITS, 21),
    # SMP has no DeepLabV3Plus on VGG. Batch normalisation of one pixel's values needs some images, here and below.
    OtherCase("smp.DeepLabV3Plus-resnet18", (4, 3, 192, 192), _SMP, smp("DeepLabV3Plus", "resnet18"), LOGITS, 21),
    OtherCase("torchvision.fcn_resnet50", (4, 3, 96, 96), _VISION, torchvision("fcn_resnet50"), TWO_HEADS, 21),
    OtherCase(
        "torchvision.deeplabv3_resnet50", (4, 3, 96, 96), _VISION, torchvision("deeplabv3_resnet50"), TWO_HEADS, 21
    ),
    OtherCase("transformers.Segformer-b0", (1, 3, 512, 512), _HUGGING, segformer, OWN_LOSS, 150),
    OtherCase("transformers.UperNet-resnet18", (2, 3, 256, 256), _HUGGING, _RESNET18, OWN_LOSS, 150),
    OtherCase(
        "monai.BasicUNet",
        (2, 1, 192, 192),
        "monai",
        basic_unet((32, 32, 64, 128, 256, 32)),
        LOGITS,
        5,
        _NO_CHANNELS_LAST,
    ),
]


# ---- one model, in this process ----


def measure(case: OtherCase, effort: Effort = EFFORT) -> dict[str, Any]:
    """What `models_of_others_report` writes of a model."""
    start = perf_counter()
    result: dict[str, Any] = {"name": case.name, "images": case.images, "classes": case.classes, "missing": []}
    timings: dict[str, dict[str, Any]] = {timing: {} for timing in TIMINGS}
    replaced: dict[str, Counter[str]] = {}
    for timing in TIMINGS:
        with (
            torch._inductor.config.patch(dict(case.inductor)),
            torch._dynamo.config.patch(recompile_limit=ENOUGH_GRAPHS),
            fastseg.recording() as found,
        ):
            outcomes = verify_and_time(case, timing == STEP, effort)
        for contestant, outcome in outcomes.items():
            if isinstance(outcome, Measured):
                seconds = [sum(passes) for passes in outcome.rounds]
                timings[timing][contestant.kind] = {"rounds": seconds, "peak": outcome.peak}
            else:
                reason = f"{type(outcome).__name__}: {outcome}"
                result["missing"].append({"timing": timing, "kind": contestant.kind, "reason": reason})
        replaced[timing] = Counter(replacement.operator for replacement in found.replaced)
    result |= {"timings": timings, "replaced": replaced}
    result["difference"] = difference(case) if FASTSEG in timings[STEP] else {}  # of what was verified
    compiling = {kind: COMPILERS.spent[type(case), kind] for kind in (COMPILE, FASTSEG)}
    return result | {"seconds": perf_counter() - start, "compiling": compiling}


def difference(case: OtherCase) -> dict[str, float]:
    """The largest difference between the backend's and eager PyTorch's loss and gradients, over the largest of eager's.

    In float64: in float32 some of millions of values fall to the other side of a ReLU or a pool in whatever is not
    eager PyTorch to the last bit, and the gradient jumps (see `ModelCase.plain`). Without Inductor, whose roundings are
    its own.
    """
    job = case.job(False, "nchw", True, torch.float64)
    fused = torch.compile(job.function, dynamic=False, backend="fastseg", options={"inner": "eager"})
    results = (case.judged(of.results()) for of in (job._replace(function=fused), job))
    return {
        name: ((f - e).abs().max() / e.abs().max()).item()
        for name, f, e in zip(("loss", "gradients"), *results, strict=True)
    }


# ---- all of them, each in a process of its own ----


def run(cases: list[OtherCase], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The results of ``cases``, beside those that an earlier run had of others."""
    order = [case.name for case in CASES]
    known = earlier or {"models": [], "absent": {}}
    results = {result["name"]: result for result in known["models"] if result["name"] in order}
    absent = {name: why for name, why in known["absent"].items() if name in order}
    for case in cases:
        results.pop(case.name, None)
        absent.pop(case.name, None)
        if missing := case.missing():
            absent[case.name] = missing
            print(f"{case.name}: {missing}")
            continue
        outcome = _in_new_process(case.name)
        if isinstance(outcome, str):
            absent[case.name] = outcome
        else:
            results[case.name] = outcome
    info = pytest_benchmark_generate_machine_info() | {"fastseg": fastseg.info()}
    packages = sorted({case.package for case in CASES if not case.missing()})
    return {
        "models": sorted(results.values(), key=lambda result: order.index(result["name"])),
        "absent": absent,
        "machine_info": info,
        "commit_info": get_commit_info(),
        "device": CPU.describe(),
        "datetime": datetime.now(timezone.utc).isoformat(),
        "peers": {package: version(package.replace("_", "-")) for package in packages},
    }


def _in_new_process(name: str) -> dict[str, Any] | str:
    """The results of one model, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = [sys.executable, "-m", "benchmarks.models_of_others", "--one", name, "--json", str(path)]
        start = perf_counter()
        status = subprocess.run(command, check=False).returncode
        print(f"{name}: {perf_counter() - start:.0f} s, exit status {status}", flush=True)
        return json.loads(path.read_text()) if status == 0 else f"its process ended with exit status {status}"


def main() -> int:
    names = {case.name: case for case in CASES}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models_of_others", description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--readme", type=Path, help="Markdown file whose table is replaced, between its two marks")
    parser.add_argument(
        "--only", action="append", choices=list(names), help="measure this model alone, and others named so"
    )
    parser.add_argument("--json", type=Path, help="file for what was measured; what it holds of other models is kept")
    parser.add_argument("--from", dest="run", type=Path, help="such a file to report, instead of measuring")
    parser.add_argument("--one", choices=list(names), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        arguments.json.write_text(json.dumps(measure(names[arguments.one])))
        return 0
    if arguments.out is None:
        parser.error("--out is needed: the Markdown file to write")
    if arguments.readme is not None:
        try:  # before all the work, not after it
            report.insert(arguments.readme.read_text(), "")
        except ValueError as error:
            parser.error(f"{arguments.readme}: {error}")
    if arguments.run is not None:
        results = json.loads(arguments.run.read_text())
    else:
        chosen = [case for name, case in names.items() if name in (arguments.only or names)]
        earlier = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else None
        results = run(chosen, earlier)
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(results))
    if not results["models"]:
        parser.error(
            "; ".join(["nothing was measured", *(f"{name}: {why}" for name, why in results["absent"].items())])
        )
    report.write(results, arguments.out)
    if arguments.readme is not None:
        arguments.readme.write_text(report.insert(arguments.readme.read_text(), report.summary(results)))
    return int(bool(results["absent"]) or any(result["missing"] for result in results["models"]))


if __name__ == "__main__":
    sys.exit(main())
