"""The sample of a test's cases: which plain `pytest` runs."""

import gc
import itertools
from pathlib import Path

import pytest

from tests.sampling import covering

GRID = [dict(zip("abcd", values, strict=True)) for values in itertools.product(range(5), range(4), range(3), range(2))]
HOLES = [row for row in GRID if row["a"] != row["b"] or row["c"] == 0]  # as of parameters that don't go together


def met(rows: list[dict[str, int]], strength: int) -> set[tuple]:
    return {pair for row in rows for pair in itertools.combinations(row.items(), strength)}


@pytest.mark.parametrize("rows", [GRID, HOLES, GRID[:1], []], ids=["grid", "holes", "one", "none"])
@pytest.mark.parametrize("strength", [1, 2, 3, 4, 5])
def test_all_that_meets_meets_in_the_sample(strength: int, rows: list[dict[str, int]]) -> None:
    chosen = [rows[number] for number in covering(rows, strength, "seed")]
    together = min(strength, 4)
    assert met(chosen, together) == met(rows, together)
    assert [row for row in rows if row in chosen] == chosen  # in the rows' own order


def test_it_is_small_and_the_same_in_every_process() -> None:
    assert len(covering(GRID, 1, "seed")) == 5
    assert len(covering(GRID, 2, "seed")) <= 22  # at least 20
    assert covering(GRID, 2, "seed") == covering(GRID, 2, "seed") != covering(GRID, 2, "other")


GRIDS = """
import pytest

@pytest.mark.parametrize("a", range(5))
@pytest.mark.parametrize("b", range(4))
@pytest.mark.parametrize("c", [0, 1, pytest.param(2, marks=pytest.mark.full)])
def test_grid(a, b, c): pass

@pytest.mark.parametrize("a", range(2))
@pytest.mark.parametrize("b", range(2))
def test_small(a, b): pass

@pytest.mark.strength(1)
@pytest.mark.parametrize("a", range(6))
@pytest.mark.parametrize("b", range(5))
def test_slow(a, b): pass

@pytest.mark.full
def test_long(): pass
"""


@pytest.mark.parametrize(
    ("arguments", "cases"),
    [
        ([""], 20 + 4 + 6),
        (["", "--strength=1"], 5 + 2 + 6),
        (["", "--full"], 60 + 4 + 30 + 1),
        (["", "--full", "--part=2/3"], 32),
        (["", "--full", "--most=3"], 3 + 2 + 3 + 1),
        (["::test_grid"], 60),
    ],
    ids=["plain", "values", "full", "part", "most", "named"],
)
def test_options(arguments: list[str], cases: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (
        "collect",
        "freeze",
        "unfreeze",
    ):  # all objects of this process, in which pytest runs within pytest
        monkeypatch.setattr(gc, function, lambda *_: None)
    (file := tmp_path / "test_grids.py").write_text(GRIDS)
    collected = []

    class Recorder:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            collected.extend(session.items)

    where, *options = arguments
    root = Path(__file__).parents[1]
    quiet = ["--collect-only", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", "--import-mode=importlib"]
    config = ["-c", str(root / "pyproject.toml"), "--rootdir", str(tmp_path)]
    assert pytest.main([*quiet, *config, f"{file}{where}", *options], plugins=[Recorder()]) == 0
    assert len(collected) == cases
