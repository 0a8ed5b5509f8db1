"""The backend's tests are the same on every CPU: what it does with bfloat16 depends on the CPU's instructions."""

import pytest

from fastseg import _bfloat16


@pytest.fixture(autouse=True)
def bfloat16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the CPU multiply bfloat16; the tests of what happens without that say so (test_bfloat16.py)."""
    monkeypatch.setattr(_bfloat16, "cpu_multiplies_bfloat16", lambda: True)
