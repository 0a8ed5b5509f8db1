"""What the run is on: GPU, driver, torch, Triton, Python and the commit."""

from __future__ import annotations

import platform
import subprocess

import torch

import fastseg
from benchmarks.gpu.stages import MARK, REPOSITORY
from benchmarks.harness.devices import CUDA


def main() -> None:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    gpu = CUDA.describe()["title"] if torch.cuda.is_available() else "no GPU"
    info = fastseg.info()
    print(
        f"{MARK}{gpu}; torch {torch.__version__}, Triton {info['triton']}, Python {platform.python_version()}, "
        f"commit {git.stdout.strip() or 'unknown'}"
    )


if __name__ == "__main__":
    main()
