"""Planted faults: whether the tests catch them. ``python -m tests.mutants [NUMBER ...] [-- PYTEST'S ARGUMENTS]``.

Builds one C++ library that holds all faults of `FAULTS` behind a switch, from a copy of ``csrc/`` under ``build/``, so
that no source and no release knows of them; a fault in Python or Triton code replaces the line when its module is
imported. Then it runs ``pytest -x`` once for each fault and prints a table of which test caught it. The exit status is
1 where a fault survived or no longer fits its source.

Mull, which plants faults in C++ by itself, is a plugin of clang and wants one executable of tests; these kernels are
built by gcc too, and their tests are in Python. mutmut would plant thousands in Python, each of which costs minutes.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.util
import linecache
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import Any, NamedTuple

from tests.sampling import INTERPRETED

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutants"
SWITCH = "FASTSEG_MUTANT"  # the environment's variable with the number of the fault, read once

# The tests that are run for a family of operators, the quick and general ones first; a fault may name one before them.
SUITE = ("test_smoke", "test_conformance")
LOSSES = (*SUITE, "test_cross_entropy", "test_upsample_cross_entropy", "test_refused", "test_cross_entropy_dice")
PREDICTIONS = (
    *SUITE, "test_upsample_argmax", "test_upsample_confusion_matrix", "test_upsample_threshold",
    "test_upsample_mask_argmax",
)  # fmt: skip
CONVOLUTIONS = (
    *SUITE, "test_relu_pool2d", "test_conv_relu_pool2d", "test_conv_relu_pool2d_winograd", "test_conv2d",
)  # fmt: skip
MACHINERY = ("test_framework", "test_refused")


class Fault(NamedTuple):
    """A fault.

    Args:
        what: What is wrong.
        path: The file.
        change: Text that is in the file once, with ``<<<right|||wrong>>>`` where right becomes wrong: in C++ two
            expressions.
        tests: The files in ``tests/ops`` that are run.
        interpreted: Whether Triton's interpreter runs the tests.
    """

    what: str
    path: str
    change: str
    tests: tuple[str, ...]
    interpreted: bool = False

    @property
    def module(self) -> str:
        """The Python module of the file."""
        return re.sub(r"^kernels/", "fastseg/kernels/", self.path).removesuffix(".py").replace("/", ".")

    def planted(self, source: str, switch: str = "{wrong}") -> str:
        """The file's text with the fault, which ``switch`` words."""
        before, right, wrong, after = re.fullmatch(r"(.*)<<<(.*)\|\|\|(.*)>>>(.*)", self.change, re.DOTALL).groups()
        whole = before + right + after
        if source.count(whole) != 1:
            raise SystemExit(f"{self.path} holds {source.count(whole)} times, not once: {whole}")
        return source.replace(whole, before + switch.format(right=right, wrong=wrong) + after)


FAULTS = (
    # ---- losses ----
    Fault("the last pixel that fills no vector isn't summed", "csrc/loss/cross_entropy_terms-inl.h",
          "for (; p < <<<count|||count - 1>>>; ++p) sums[0]", LOSSES),
    Fault("the first pixel of a run is never ignored", "csrc/loss/cross_entropy_terms-inl.h",
          "-static_cast<int64_t>(<<<label == ignore_index|||label == ignore_index && p > 0>>>)", LOSSES),
    Fault("the second task's loss is left out", "csrc/loss/cross_entropy_terms-inl.h",
          "loss += <<<partials[task].loss|||task == 1 ? 0 : partials[task].loss>>>;", LOSSES),
    Fault("the last task alone is asked for an invalid label", "csrc/loss/cross_entropy_terms-inl.h",
          "task < count && <<<!call.invalid->found|||true>>>; ++task)", ("test_refused", *LOSSES)),
    Fault("a smoothed mean over no weight is infinite, not NaN", "csrc/loss/cross_entropy_terms-inl.h",
          "loss = <<<smoothed_labels && weight == 0|||false>>> ?", ("test_upsample_cross_entropy", *LOSSES)),
    Fault("smoothing forgets the classes' weights", "csrc/loss/cross_entropy_loops-inl.h",
          "if (kKind == Kind::kSmoothedLabels) spread[i] -= sum[i] * <<<terms.shift_sum|||terms.smoothing>>>;", LOSSES),
    Fault("the gradient forgets the label's weight", "csrc/loss/cross_entropy_loops-inl.h",
          "kIgnored ? 0 : <<<terms.scale[tile.labels[p]]|||1 - terms.smoothing>>> * tile.grad[p]", LOSSES),
    Fault("classes of the last vector count twice", "csrc/loss/cross_entropy_loops-inl.h",
          "rest[lane] = <<<last + lane < whole|||false>>> ? 0 : -1", ("test_cross_entropy", *LOSSES)),
    # ---- upsampling ----
    Fault("of equal logits the last class is predicted", "csrc/upsampling/argmax_rows-inl.h",
          "label[i] = <<<logit > best[i]|||logit >= best[i]>>> ? candidate", ("test_upsample_argmax", *PREDICTIONS)),
    Fault("a number replaces NaN", "csrc/upsampling/argmax_rows-inl.h",
          "~(logit <= best[i]) & <<<(best[i] == best[i])|||~IntVec<T>{}>>>;", ("test_upsample_argmax", *PREDICTIONS)),
    Fault("the last row and column are nobody's neighbours", "csrc/upsampling/upsampled_rows-inl.h",
          "first + (first < input_size - <<<1|||2>>>)", PREDICTIONS),
    Fault("positions are off by a part in a hundred thousand", "csrc/upsampling/upsampled_rows-inl.h",
          "const double step = <<<grid.step[static_cast<int>(axis)]|||"
          "static_cast<float>(grid.step[static_cast<int>(axis)]) * 1.00001f>>>;", PREDICTIONS),
    Fault("a volume's planes count the other way round", "csrc/upsampling/upsampled_rows-inl.h",
          "load(second + x) * <<<planes_.second_weight|||planes_.first_weight>>>", PREDICTIONS),
    Fault("a right neighbour's gradient is lost where its turn comes", "csrc/upsampling/upsampled_gradient-inl.h",
          "left_sum = <<<right_sum|||Classes{}>>>;", LOSSES),
    Fault("the row that two bands share has one band's gradient", "csrc/upsampling/upsampled_gradient-inl.h",
          "own[i] += <<<other[i]|||T(0)>>>;", ("test_upsample_cross_entropy", *LOSSES)),
    Fault("an output plane's gradient goes to one input plane", "csrc/upsampling/upsampled_gradient-inl.h",
          "second[i] += rows[i] * <<<planes.second_weight|||T(0)>>>;", LOSSES),
    Fault("the last task's counts are left out", "csrc/upsampling/upsample_confusion_matrix.cpp",
          "matrix[i] += <<<counts[task * cells + i]|||task > 0 && task + 1 == tasks ? 0 : counts[task * cells + i]>>>;",
          ("test_upsample_confusion_matrix", *PREDICTIONS)),
    Fault("a logit at the threshold is inside", "csrc/upsampling/upsample_threshold.cpp",
          "inside[i] = <<<logits(c, x + i * kLanes<T>) > bound|||logits(c, x + i * kLanes<T>) >= bound>>>;",
          ("test_upsample_threshold", *PREDICTIONS)),
    Fault("what fills up a row's last vectors counts in a mask", "csrc/upsampling/upsample_threshold.cpp",
          "if (kSums) inside[i] &= places < static_cast<Int<T>>(<<<count - x - i * kLanes<T>|||kPixelMultiple>>>);",
          ("test_upsample_threshold", *PREDICTIONS)),
    Fault("a box ends at the first band's last row", "csrc/upsampling/upsample_threshold.cpp",
          "max_of(all.bottom, <<<part.bottom|||all.bottom < 0 ? part.bottom : -1>>>)",
          ("test_upsample_threshold", *PREDICTIONS)),
    Fault("classes of the second block keep the first one's numbers", "csrc/upsampling/upsample_mask_argmax.cpp",
          "static_cast<Int<T>>(<<<first + c|||c>>>) : label[i];", ("test_upsample_mask_argmax", *PREDICTIONS)),
    Fault("the sigmoid of minus infinity is NaN", "csrc/simd/vector_math-inl.h",
          "maximum<T>(lowest, -<<<maximum<T>(lowest, x)|||x>>>)", ("test_upsample_mask_argmax", *PREDICTIONS)),
    Fault("a share that is ignored counts in the gradient", "csrc/loss/upsample_sigmoid_sums.cpp",
          "keep(c, p, <<<select_or_zero<T>(shares.counts(p), gradient)|||gradient>>>);", ("test_class_sums", *LOSSES)),
    Fault("the columns after the first 1024 have the first ones' labels", "csrc/loss/upsample_sigmoid_sums.cpp",
          "!target.select(image, y, begin + <<<x|||0>>>, count)", ("test_class_sums", *LOSSES)),
    # ---- convolutions ----
    Fault("of equal values the window's last is taken", "csrc/convolution/pool_tile-inl.h",
          "better = <<<(candidate > best)|||(candidate >= best)>>> |", ("test_relu_pool2d", *CONVOLUTIONS)),
    Fault("ReLU makes zero of a skip's NaN", "csrc/convolution/conv_tile-inl.h",
          "<<<load(passed + i) <= Vec<T>{}|||~(load(passed + i) > Vec<T>{})>>> ? Vec<T>{}",
          ("test_relu_pool2d", *CONVOLUTIONS)),
    Fault("ReLU leaves out what follows the last window", "csrc/convolution/relu_pool2d.cpp",
          "== call.output.size[2] ? <<<call.input.size[2]|||min_of(begin + g.pool_stride[0], call.input.size[2])>>> :",
          ("test_conv_relu_pool2d", *CONVOLUTIONS)),
    Fault("a gradient is added to fresh memory", "csrc/convolution/relu_pool2d.cpp",
          "if (<<<!call.grad_skip|||!call.grad_skip && base > 0>>>) memset(target", CONVOLUTIONS),
    Fault("columns are read as if they were neighbours", "csrc/convolution/winograd_windows-inl.h",
          "input.stride[1],\n           <<<input.stride[3]|||int64_t{1}>>>, row_buffer", CONVOLUTIONS),
    Fault("a window over the edge counts a column beyond it", "csrc/convolution/winograd_windows-inl.h",
          "(window + lane + 1) > <<<shape.convolved_w|||shape.convolved_w + 1>>>}",
          ("test_conv_relu_pool2d_winograd", *CONVOLUTIONS)),
    Fault("a slice of a deep layer's channels forgets those before it", "csrc/convolution/winograd_channels-inl.h",
          "adds = <<<of.begin > 0|||false>>>;", ("test_conv_relu_pool2d_winograd", *CONVOLUTIONS)),
    Fault("a row's last windows are written past its end", "csrc/convolution/winograd_planes-inl.h",
          "if (columns >= <<<kPoolSide * kLanes<T>|||1>>>)", ("test_conv2d", *CONVOLUTIONS)),
    Fault("what isn't finite goes unseen in NCHW", "csrc/convolution/winograd_planes-inl.h",
          "return <<<largest_lane<T>(largest) <= kernels.largest_input|||true>>>;", ("test_conv2d", *CONVOLUTIONS)),
    Fault("the bias's gradient is its first part's", "csrc/convolution/conv_relu_pool2d_backward_weight-inl.h",
          "part < <<<parts|||1>>>; ++part) sum +=", ("test_conv_relu_pool2d", *CONVOLUTIONS)),
    # ---- normalisation ----
    Fault("a block's mean stays as it was rounded", "csrc/normalization/instance_norm.cpp",
          "const T correction = <<<to.third[i] / values|||T(0)>>>;", ("test_instance_norm",)),
    Fault("a plane's rest has no part in its mean", "csrc/normalization/instance_norm.cpp",
          "if (<<<rest.columns > 0|||false>>>) visit(", ("test_instance_norm",)),
    Fault("blocks' variances leave out that their means differ", "csrc/normalization/instance_norm.cpp",
          "distance * distance * <<<weight|||0.0>>>;", ("test_instance_norm",)),
    Fault("a gradient passes where the leaky ReLU's input was negative", "csrc/normalization/instance_norm.cpp",
          "? gradient : gradient * <<<slope|||T(1)>>>};", ("test_instance_norm",)),
    # ---- Python ----
    Fault("a fake gradient is contiguous", "fastseg/ops/cross_entropy.py",
          "*rest: Any) -> Tensor:\n    return <<<torch.empty_like(input)|||input.new_empty(input.shape)>>>", MACHINERY),
    Fault("saved tensors are unpacked twice", "fastseg/ops/upsample_cross_entropy.py",
          "grad_loss, grad_overlap, *<<<saved|||ctx.saved_tensors>>>,", MACHINERY),
    Fault("small logits take a weight of any rank", "fastseg/ops/cross_entropy.py",
          "weight.dtype == torch.float32<<< and weight.ndim == 1|||>>>)", MACHINERY),
    Fault("autocast is to bfloat16, whatever was asked for", "fastseg/ops/conv_relu_pool2d.py",
          "dtype = <<<torch.get_autocast_dtype(device)|||torch.bfloat16>>>", MACHINERY),
    Fault("any convolution without a pool is oneDNN's, not one of bfloat16", "fastseg/ops/convolution/algorithms.py",
          "numbers == WINOGRAD_UNPOOLED<<< and input.dtype == torch.bfloat16|||>>> and _bfloat16", CONVOLUTIONS),
    Fault("a frozen weight's version doesn't count", "fastseg/ops/convolution/kept.py",
          "hash((weight.data_ptr(), <<<weight._version|||0>>>))", ("test_kept_weights",)),
    # ---- Triton ----
    Fault("a number replaces NaN on a GPU", "kernels/upsample_argmax.py",
          "((logits <= largest) == 0)<<< & (largest == largest)|||>>>", ("test_upsample_argmax",), interpreted=True),
    Fault("a pair's class is never its second one on a GPU", "kernels/upsample_argmax.py",
          "label += tl.where(here & (<<<logits != wanted|||logits < logits>>>), 1, 0)", ("test_upsample_argmax",),
          interpreted=True),
    Fault("smoothing leaves out the first of few classes on a GPU", "kernels/cross_entropy_few.py",
          "        if SMOOTHED<<<||| and index > 0>>>:\n            q = _smoothed_share(weight, smoothing_bits, index, "
          "CLASSES, ACC)\n            spread", ("test_cross_entropy",), interpreted=True),
    Fault("a mask's pixels are counted in its first block alone on a GPU", "kernels/upsample_threshold.py",
          "cells = block < blocks, mask * blocks + <<<block|||0 * block>>>", ("test_upsample_threshold",),
          interpreted=True),
    Fault("the last query is left out on a GPU", "kernels/upsample_mask_argmax.py",
          "CLASSES) & (queries[:, None] < <<<QUERIES|||QUERIES - 1>>>), 0)", ("test_upsample_mask_argmax",),
          interpreted=True),
    Fault("sums of earlier classes keep the old maximum on a GPU", "kernels/cross_entropy_pixels.py",
          "spread += <<<(base_before - base) * share|||0.0>>> +", ("test_cross_entropy",), interpreted=True),
)  # fmt: skip


# ---- the C++ library ----


def in_cpp(fault: Fault) -> bool:
    """Whether the fault is in the C++ library."""
    return fault.path.startswith("csrc/")


def build() -> Path:
    """The library with all C++ faults behind the switch, of the instruction set that every machine has."""
    sources = BUILD / "csrc"
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            text, name = path.read_text(), path.relative_to(ROOT).as_posix()
            for number, fault in enumerate(FAULTS):
                if fault.path == name:
                    text = fault.planted(text, f"(fastseg_mutant == {number} ? ({{wrong}}) : ({{right}}))")
            if "fastseg_mutant" in text:
                text = "extern const int fastseg_mutant;\n" + text
            if path.name == "isa.cpp":
                number_read = f'std::getenv("{SWITCH}") ? std::atoi(std::getenv("{SWITCH}")) : -1'
                text = f"#include <cstdlib>\nextern const int fastseg_mutant = {number_read};\n" + text
            target = sources / path.relative_to(ROOT / "csrc")
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.exists() or target.read_text() != text:  # else it isn't compiled again
                target.write_text(text)
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True).stdout
    configure = [
        "cmake", "-S", sources, "-B", BUILD / "cmake", "-DCMAKE_BUILD_TYPE=Release", "-DFASTSEG_PORTABLE_ONLY=ON",
        f"-Dpybind11_DIR={pybind11.strip()}", f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", BUILD / "cmake", "--parallel"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (library,) = (BUILD / "cmake").glob("_C.*")
    return library


# ---- in the process of the tests ----


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module with a fault."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The spec of the fault's module alone."""
        return importlib.util.spec_from_loader(name, self) if name == self.fault.module else None

    def exec_module(self, module: ModuleType) -> None:
        """Runs the changed source, where `inspect`, and so Triton, finds it too."""
        source, name = self.fault.planted((ROOT / self.fault.path).read_text()), f"<planted {self.fault.path}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        exec(compile(source, name, "exec"), module.__dict__)


def run_tests(fault: Fault, library: str, arguments: Sequence[str]) -> int:
    """Runs pytest with a fault, in this process, which hasn't imported fastseg yet; its exit status."""
    import pytest
    import torch  # noqa: F401  # before the library: see `fastseg._native`

    if in_cpp(fault):
        spec = importlib.util.spec_from_file_location("fastseg._C", library)
        sys.modules["fastseg._C"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fastseg._C"])
    else:
        sys.meta_path.insert(0, Planter(fault))
    return pytest.main(list(arguments))


# ---- the table ----


def catch(number: int, library: Path, arguments: Sequence[str]) -> str:
    """What catches a fault: a test's name, or ""."""
    fault = FAULTS[number]
    files = [f"tests/ops/{name}.py" for name in fault.tests]
    command = [sys.executable, "-m", "tests.mutants", "--run", str(number), "--library", str(library), "--"]
    command += ["-x", "-q", "-p", "no:cacheprovider", *arguments, *files]
    environment = {**os.environ, SWITCH: str(number), "OMP_NUM_THREADS": "1"}
    if fault.interpreted:
        environment["TRITON_INTERPRET"] = "1"
        command += INTERPRETED
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return ""
    if run.returncode < 0:
        return f"a crash (signal {-run.returncode})"
    failed = re.search(r"^FAILED tests/ops/(\S+)", run.stdout, re.MULTILINE)
    if run.returncode != 1 or failed is None:
        raise SystemExit(
            f"fault {number}: pytest ended with {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-3000:]}"
        )
    return failed[1]


def main() -> int:
    """Prints the table; 1 where a fault survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.partition("\n")[0])
    parser.add_argument("numbers", type=int, nargs="*", help="of the faults to plant (default: all)")
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--library", help=argparse.SUPPRESS)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if options.run is not None:
        return run_tests(FAULTS[options.run], options.library, arguments)
    numbers = options.numbers or range(len(FAULTS))
    library = build() if any(in_cpp(FAULTS[number]) for number in numbers) else Path()
    survivors = 0
    for number in numbers:
        start = perf_counter()
        caught = catch(number, library, arguments)
        survivors += not caught
        print(
            f"{number:2} {perf_counter() - start:5.0f} s  {FAULTS[number].what:60} {caught or 'SURVIVED'}", flush=True
        )
    print(f"{len(numbers) - survivors} of {len(numbers)} faults were caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
