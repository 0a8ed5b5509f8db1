"""The operators' tests once more, in processes where Triton's interpreter runs the GPU kernels on CPU tensors.

Every Nth case of each test, so that all of them take minutes; N shares no factor with the numbers of a test's
parameters, so that each of those comes in turn. All: ``TRITON_INTERPRET=1 pytest tests/ops/test_cross_entropy.py``.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")

FILES = {
    "ops/test_cross_entropy.py": 17,
    "ops/test_conv_relu_pool2d.py": 13,
    "ops/test_conv_relu_pool2d_fields.py": 11,
    "ops/test_relu_pool2d.py": 29,
    "kernels/test_labels.py": 1,
    "ops/test_conformance.py": 97,
    "ops/test_framework.py": 41,
    "ops/test_upsample_cross_entropy.py": 31,
    "ops/test_upsample_argmax.py": 13,
    "ops/test_upsample_confusion_matrix.py": 13,
    "ops/test_class_sums.py": 37,
    "ops/test_upsample_threshold.py": 23,
    "ops/test_upsample_mask_argmax.py": 71,
    "ops/test_cross_entropy_dice.py": 41,
    "ops/test_focal_loss.py": 29,
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen]]:
    """A process for each file, all at the same time."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--full", f"--every={every}", name],
            cwd=tests, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name, every in FILES.items()
    }  # fmt: skip
    yield processes
    for process in processes.values():
        with process:  # which closes its output, where no test has read that
            process.kill()


@pytest.mark.parametrize("name", FILES)
def test_kernels_under_the_interpreter(runs: dict[str, subprocess.Popen], name: str) -> None:
    output, _ = runs[name].communicate()
    assert runs[name].returncode == 0, output
