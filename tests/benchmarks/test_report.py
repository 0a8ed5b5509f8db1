"""The benchmark suite's roofline, and the report that is written of a run."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from benchmarks.cases import bench_models
from benchmarks.cases.bench_conv_relu_pool2d import ConvReLUPool2dCase
from benchmarks.cases.bench_cross_entropy import CrossEntropyCase
from benchmarks.cases.bench_models import ModelCase
from benchmarks.harness import roofline, suite
from benchmarks.harness.devices import CPU, CUDA, Device, Processor
from benchmarks.harness.roofline import Ceilings, Work, measure_ceilings
from benchmarks.reports import report
from tests.benchmarks.cases import RUN

# ---- roofline ----

IMAGES, WEIGHT, POOLED = 2 * 3 * 8 * 10, 4 * 3 * 9, 2 * 4 * 4 * 5  # elements of 2x3x8x10->4, pooled 2x2
PRODUCTS = 2 * 4 * 8 * 10 * 27


@pytest.mark.parametrize("input_gradient", [False, True], ids=["images", "features"])
@pytest.mark.parametrize(("device", "itemsize"), [(CPU, 4), (CUDA, 2)], ids=["float32", "bfloat16"])
def test_work_of_a_convolution(device: Device, itemsize: int, input_gradient: bool) -> None:
    case = ConvReLUPool2dCase((2, 3, 8, 10), 4, input_gradient=input_gradient, device=device)
    read = itemsize * (IMAGES + WEIGHT + 4)
    assert case.work(suite.FORWARD) == (Work(read + itemsize * POOLED, 2 * PRODUCTS),)
    forward, backward = case.work(suite.BOTH)
    assert forward == Work(read + (itemsize + 1) * POOLED, 2 * PRODUCTS)
    # Pooled gradient, positions and input in; the gradients of weight and bias out, of the input where it is wanted.
    size = (itemsize + 1) * POOLED + itemsize * (IMAGES + WEIGHT + 4)
    if input_gradient:
        size += itemsize * (WEIGHT + IMAGES)
    assert backward == Work(size, 2 * PRODUCTS * (1 + input_gradient))
    assert case.work(suite.BACKWARD) == (backward,)


def test_work_of_a_loss() -> None:
    case = CrossEntropyCase((2, 5, 4, 6), device=CUDA)
    logits, labels = 2 * 2 * 5 * 4 * 6, 8 * 2 * 4 * 6
    assert case.work(suite.FORWARD) == (Work(logits + labels),)
    assert case.work(suite.BOTH) == (Work(logits + labels), Work(2 * logits + labels))


def test_work_of_a_model() -> None:
    case = ModelCase("FCN", (1, 3, 16, 16))
    network = case.build(False, None)
    parameters = 4 * sum(parameter.numel() for parameter in network.parameters())
    layers = [(3, 32, 9, 16), (32, 64, 9, 8), (64, bench_models.NUM_CLASSES, 1, 4)]
    products = [before * after * taps * side**2 for before, after, taps, side in layers]
    images, pixels = 4 * 3 * 16 * 16, 16 * 16
    assert case.work(suite.FORWARD) == (Work(images + parameters + pixels, 2 * sum(products)),)
    forward, backward = case.work(suite.BOTH)
    assert forward == Work(images + parameters + 8 * pixels, 2 * sum(products))
    # The images need no gradient.
    assert backward == Work(images + 2 * parameters + 8 * pixels, 2 * (2 * sum(products) - products[0]))
    assert case.work(suite.BACKWARD) == (backward,)


def test_a_pass_is_bounded_by_its_slower_half() -> None:
    ceilings = Ceilings(bytes_per_second=100, operations_per_second=1000)
    passes = (Work(200, 500), Work(100, 3000))
    assert ceilings.seconds(passes) == 2 + 3
    assert ceilings.limits(passes) == ["bytes", "operations"]


def test_ceilings_are_measured() -> None:
    class SmallProcessor(Processor):
        copied_bytes = 2**16
        matrix_sides = (32, 64)

    ceilings = measure_ceilings(SmallProcessor())
    assert ceilings.bytes_per_second > 1e6
    assert ceilings.operations_per_second > 1e6


def test_the_fastest_call_gives_the_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stopwatch(Processor):
        """Calls of 2, 1, 2, 1, ... seconds."""

        copied_bytes = 2**10
        matrix_sides = (10, 20)
        marks: ClassVar[Iterator[float]] = itertools.accumulate(itertools.cycle([0, 2, 0, 1]))

        def mark(self) -> float:
            return next(self.marks)

    monkeypatch.setattr(roofline, "SECONDS", 0)
    assert measure_ceilings(Stopwatch()) == Ceilings(3 * 2**10, 2 * 20**3)


# ---- report ----


def entry(kind: str, timing: str, seconds: list[float]) -> dict:
    info = {
        "operator": "pool",
        "case": "2x2",
        "timing": timing,
        "kind": kind,
        "layout": "nchw",
        "peak_bytes": 3 * 2**20,
        "returned_bytes": 2**20,
        "work": [[1_000_000, 0], [500_000, 4_000_000]] if timing == "forward" else [],
    }
    return {"extra_info": info, "stats": {"data": seconds}}


def test_report(tmp_path: Path) -> None:
    missing = {"operator": "pool", "case": "2x2", "timing": "forward", "layout": "nchw"}
    run = {
        **RUN,
        "device": {"type": "cuda", "dtype": "bfloat16", "title": "A GPU, driver 1.2.3"},
        "compiling": {"compile": 12.3},
        "peers": {"OpenVINO": None},
        "absent": {"OpenVINO": "not installed (pip install openvino)", "peak memory": None},
        "log": ["pool runs as plain PyTorch: no kernel"],
        "benchmarks": [
            # Twice as fast in most rounds, though the quotient of the medians is 1.5.
            entry("fastseg", "forward", [0.001, 0.004, 0.010]),
            entry("eager", "forward", [0.002, 0.006, 0.020]),
            entry("fastseg", "backward", [0.2]),
            entry("eager", "backward", [0.1]),
        ],
        "missing": [
            missing | {"kind": "compile", "skipped": False, "reason": "CompilerFailed:\nno compiler\nmore"},
            missing | {"kind": "max-autotune", "skipped": True, "reason": "no time"},
        ],
    }  # fmt: skip
    path = tmp_path / "results" / "report.md"
    report.write(run, path)
    text = path.read_text()
    for line in (
        "* A GPU, driver 1.2.3\n* A CPU, 2 cores, Linux\n* fastseg 0.1 (commit 0123456789)\n",
        "* bfloat16, 2026-11-22, 321 s in all, 12 s for compile\n",
        "* peaks: 1.00 GB/s read and written, 2.00 GFLOP/s of a bfloat16 matrix product\n",
        "2.00x (1.75 - 2.00)",
        "**0.50x**",
        "| fastseg NCHW | eager NCHW | compile NCHW | max-autotune NCHW | fastseg NCHW x best peer |",  # who took part
        "4.00 (2.50 - 7.00) | 6.00 (4.00 - 13.0) | failed | skipped",
        # 1 ms for the bytes of the one pass, 2 ms for the operations of the other.
        "| 2x2 | forward | 1.50 | 0.00400 | 3.00 | bytes + operations | 1.00 (50%) | 0.375 (38%) | 75% | - | - | - |",
        "| 2x2 | forward | 3.0 (2.0) | 3.0 (2.0) | - (-) | - (-) | 1.00x |",  # eager's extra memory over fastseg's
        "* pool 2x2, forward, compile NCHW, failed: `CompilerFailed: no compiler`",
        "* pool 2x2, forward, max-autotune NCHW, skipped: `no time`",
        "## Not measured\n\n* OpenVINO: not installed (pip install openvino)\n* pool 2x2",
        "## fastseg's log\n\n* pool runs as plain PyTorch: no kernel",
    ):
        assert line in text
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "effective)" not in text
    assert "peak memory:" not in text
    # A kernel that saves multiplications passes the peak.
    run["ceilings"]["operations_per_second"], run["peers"], run["absent"] = 5e8, {"OpenVINO": "2026.4"}, {}
    run["commit_info"] = {"id": "unversioned", "dirty": False}  # outside a checkout
    report.write(run, path)
    text = path.read_text()
    assert "(commit unknown)" in text
    assert "* torch 2.13, OpenVINO 2026.4, Python 3.11\n" in text
    assert "| 1.00 (200%, effective) | 0.375 (38%) | 225% |" in text
