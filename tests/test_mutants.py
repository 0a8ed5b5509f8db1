"""The planted faults of ``python -m tests.mutants``: all still fit their sources, and one is caught."""

from pathlib import Path

import pytest

from tests import mutants


@pytest.mark.parametrize("fault", mutants.FAULTS, ids=lambda fault: fault.what)
def test_fault_fits_its_source(fault: mutants.Fault) -> None:
    source = (mutants.ROOT / fault.path).read_text()
    assert fault.planted(source) != source


def test_a_fault_is_caught() -> None:
    number = [fault.what for fault in mutants.FAULTS].index("small logits take a weight of any rank")
    assert "weight-rank" in mutants.catch(number, Path(), ["-k", "weight-rank and cross_entropy"])
