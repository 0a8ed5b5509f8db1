"""The pictures of stored results: drawn from the tables of the reports, with every number that they should show."""

from pathlib import Path

import pytest

pytest.importorskip("benchmarks", reason="benchmarks/ is part of a checkout, not of the installed package")
pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.harness.suite import BOTH, EAGER, FASTSEG, FORWARD, OPENVINO
from benchmarks.reports import __main__, charts, overview, stored
from benchmarks.reports.stored import Figures

SUITE = """\
# Benchmarks

* 2 threads
* A CPU, 2 cores, Linux

## Summary

| case | forward ms | x best peer |
| --- | ---: | ---: |
| pool small | 9.00 | 9.00x |

## pool

Milliseconds

| case | timing | fastseg NCHW | fastseg channels_last | eager NCHW | fastseg NCHW x best peer | fastseg channels_last x best peer |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| small | forward | 2.00 (1.00 - 3.00) | 1.50 (1.00 - 2.00) | 1.20 (1.00 - 1.30) | **0.60x** (0.50 - 0.70) | **0.80x** (0.70 - 0.90) |
| small | forward+backward | failed | 4.00 (3.00 - 5.00) | 48.0 (40.0 - 50.0) | - | 12.04x (11.00 - 13.00) |

Of the roofline

| case | timing | fastseg NCHW |
| --- | ---: | ---: |
| small | forward | 7 |

Peak memory, MiB; in brackets the extra memory, without the values and gradients returned

| case | timing | fastseg NCHW | fastseg channels_last | eager NCHW |
| --- | ---: | ---: | ---: | ---: |
| small | forward | 3.0 (1.0) | - (-) | 6.0 (4.0) |
"""  # noqa: E501


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (path := tmp_path / "suite.md").write_text(SUITE)
    return path


def test_a_report_is_read_back(suite: Path) -> None:
    assert stored.read(suite) == {
        ("pool", "small"): {
            FORWARD: {
                "fastseg NCHW": Figures(2.0, 3.0, 0.6),
                "fastseg channels_last": Figures(1.5, None, 0.8),
                "eager NCHW": Figures(1.2, 6.0, None),
            },
            BOTH: {"fastseg channels_last": Figures(4.0, None, 12.04), "eager NCHW": Figures(48.0, None, None)},
        }
    }
    assert stored.machine(suite) == "A CPU, 2 cores"
    assert stored.fastest(stored.read(suite)["pool", "small"][FORWARD], FASTSEG) == Figures(1.5, None, 0.8)
    assert stored.fastest(stored.read(suite)["pool", "small"][FORWARD], OPENVINO) is None
    suite.write_text("# No report")
    with pytest.raises(ValueError, match=r"suite\.md names no processor"):
        stored.machine(suite)


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the next picture says; each text is held to lie within the picture."""
    said: list[str] = []
    save = Figure.savefig

    def record(figure: Figure, *args: object, **kwargs: object) -> None:
        save(figure, *args, **kwargs)
        texts = [*figure.texts]
        for axes in figure.axes:
            texts += [*axes.texts, *(axes.get_xticklabels() if axes.axison else ())]
        for text in texts:
            box = text.get_window_extent()
            assert figure.bbox.containsx(box.x0), f"{text} is cut off"
            assert figure.bbox.containsx(box.x1), f"{text} is cut off"
            assert figure.bbox.containsy(box.y0), f"{text} is cut off"
            assert figure.bbox.containsy(box.y1), f"{text} is cut off"
            said.append(text.get_text())

    monkeypatch.setattr(Figure, "savefig", record)
    return said


def test_the_chart_has_a_bar_and_its_numbers_for_each_timing(monkeypatch: pytest.MonkeyPatch, suite: Path) -> None:
    said = texts(monkeypatch)
    charts.draw(suite, suite.with_suffix(".png"))
    assert {"pool", "small", "0.80x  1.50 ms", "12.0x  4.00 ms"} <= {*said}
    assert not any("9.00" in text for text in said)  # the summary isn't drawn as a group of cases


def test_less_than_the_best_other_is_said_and_more_is_not() -> None:
    assert overview.times_of_best(2.0, [9.0, 5.0]) == ", 2.5x"
    assert overview.times_of_best(6.0, [9.0, 5.0]) == ""
    assert overview.times_of_best(6.0, []) == ""


def test_the_overview_has_the_fastest_memory_format_of_each(suite: Path) -> None:
    figures = overview.figures_of(stored.read(suite)["pool", "small"][FORWARD])
    assert figures == {FASTSEG: Figures(1.5, None, 0.8), EAGER: Figures(1.2, 6.0, None)}


def test_the_projects_pictures_can_be_drawn_and_nothing_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = texts(monkeypatch)
    for name in (f"{__main__.MACHINE}.md", f"{__main__.MACHINE}-models.md"):
        (tmp_path / name).write_text((__main__.RESULTS / name).read_text())
    monkeypatch.setattr(__main__, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks.reports"])
    __main__.main()
    with Image.open(tmp_path / "overview.png") as image:
        assert image.size[0] == 1200
    assert all(case.title in said for case in overview.CASES)
    for (operator, case), timings in stored.read(tmp_path / f"{__main__.MACHINE}.md").items():
        assert {operator, case} <= {*said}
        assert len(charts.bars_of(timings, 0)) == 1 + (BOTH in timings)
