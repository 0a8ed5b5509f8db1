"""README, CONTRIBUTING and docs/: every path and link that they name exists."""

import re
import subprocess
from pathlib import Path

import pytest

import fastseg
import fastseg.metrics

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
# What stands between backticks and has a slash or a known ending, without a placeholder (<machine>, *, FILE).
PATH = re.compile(r"`([\w.-]+(?:/[\w.-]+)*(?:/|\.(?:py|md|toml|txt|json|png|cpp|h)))`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
READERS_OWN = {"data.md", "training.md"}  # their paths are of readers' data sets


def named(document: Path) -> list[tuple[str, Path]]:
    """What a document names, and the folder that it is relative to."""
    text = document.read_text()
    paths = [(name, ROOT) for name in PATH.findall(text)] if document.name not in READERS_OWN else []
    return paths + [(name, document.parent) for name in LINK.findall(text) if not name.startswith("../../")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_paths_exist(document: Path) -> None:
    missing = [name for name, folder in named(document) if not (folder / name).exists()]
    # A table's row may name folders inside of the one before: `fastseg/models/`, `data/`.
    missing = [name for name in missing if not (ROOT / "fastseg" / name).exists()]
    assert missing == []


def test_every_head_is_served() -> None:
    """The quick start's table of heads: no cell is empty, and what it names exists."""
    _, _, table = (ROOT / "docs/quickstart.md").read_text().partition("## Heads\n")
    rows = [line.strip("|").split("|") for line in table.partition("\n##")[0].splitlines() if line.startswith("|")]
    assert len(rows) > 5
    assert all(cell.strip() for row in rows for cell in row)
    for name in re.findall(r"`(?:losses\.|metrics\.)?([A-Za-z]\w*)(?:\([^`]*\))?`", "|".join(map("|".join, rows[2:]))):
        homes = (fastseg, fastseg.losses, fastseg.metrics, fastseg.functional)
        assert name == "return_scores" or any(hasattr(home, name) for home in homes), name


def test_an_operators_name_lists_the_whole_of_it() -> None:
    """CONTRIBUTING says so of `git ls-files '*cross_entropy*'`."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    for operator in ("conv_relu_pool2d", "relu_pool2d", "cross_entropy", "upsample_cross_entropy", "upsample_argmax"):
        listing = subprocess.run(["git", "ls-files", f"*{operator}*"], cwd=ROOT, capture_output=True, text=True).stdout
        folders = {name.partition("/")[0] for name in listing.splitlines()}
        assert folders >= {"fastseg", "kernels", "csrc", "tests", "benchmarks"}, operator
