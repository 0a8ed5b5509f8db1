"""Pictures of a run say which run it is."""

from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib isn't installed: it comes with the extra [train]")
from matplotlib.figure import Figure

from fastseg.training import EpochRecord, plots


def test_curves_name_their_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plots.save_history([EpochRecord(1, 1.0, 1.0, 0.5, 0.5, (0.5,), 1.0, 8.0)], tmp_path / "unet-2" / "curves.png")
    assert figures[0].get_suptitle() == str(tmp_path / "unet-2")
