"""Compiles every kernel for the chip at hand (for an H100 where there is none), which fills Triton's cache.

The package needn't be installed yet: `fastseg.kernels` is found in the repository.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.stages import MARK, REPOSITORY

FEW = 2  # specimens of a rehearsal


def link_package() -> None:
    """Starts this process again where `fastseg` isn't installed, with a folder on its path in which it is whole."""
    try:
        import fastseg.kernels  # noqa: F401
    except ImportError:
        folder = Path(tempfile.mkdtemp())
        (folder / "fastseg").mkdir()
        for path in (REPOSITORY / "fastseg").iterdir():
            (folder / "fastseg" / path.name).symlink_to(path)
        (folder / "fastseg" / "kernels").symlink_to(REPOSITORY / "kernels")
        environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{REPOSITORY}", "PYTHONSAFEPATH": "1"}
        os.execve(sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], environment)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--few", action="store_true", help="a few kernels alone")
    parser.add_argument("--json", type=Path, help="where the table goes, too")
    arguments = parser.parse_args()
    link_package()
    from fastseg.kernels import compile
    from fastseg.kernels.specimens import SPECIMENS

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    specimens = SPECIMENS[:: len(SPECIMENS) // FEW] if arguments.few else SPECIMENS
    status = compile.main(f"cuda:{10 * major + minor}", arguments.json, specimens)
    print(f"{MARK}{'every kernel compiles' if status == 0 else 'a kernel does not compile'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
