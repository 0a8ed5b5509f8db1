"""Cases of the operators' tests once more, in a process where Triton's interpreter runs the GPU kernels on CPU tensors.

All of a file: ``TRITON_INTERPRET=1 pytest --full tests/ops/test_cross_entropy.py``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sampling import INTERPRETED

pytest.importorskip("triton", reason="Triton isn't installed: it comes with the extra [test] on Linux x86-64")

FILES = [
    f"{name}.py"
    for name in (
        "ops/test_cross_entropy", "ops/test_conv_relu_pool2d", "ops/test_conv_relu_pool2d_fields",
        "ops/test_relu_pool2d", "kernels/test_labels", "ops/test_conformance", "ops/test_framework",
        "ops/test_upsample_cross_entropy", "ops/test_upsample_argmax", "ops/test_upsample_confusion_matrix",
        "ops/test_class_sums", "ops/test_upsample_threshold", "ops/test_upsample_mask_argmax",
        "ops/test_cross_entropy_dice", "ops/test_focal_loss",
    )
]  # fmt: skip


def test_kernels_under_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED, *FILES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
