"""Fixtures that several test files share."""

from collections.abc import Iterator

import pytest
import torch

from fastseg import _native
from fastseg.ops import cross_entropy as operator

if _native.INTERPRETED:
    import triton_interpreter

    triton_interpreter.prepare()

# What CPU tensors may run through.
CPU_KERNELS = ["triton"] if _native.INTERPRETED else _native._C.runnable_isas()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run, in whatever order the tests come."""
    torch.manual_seed(0)


@pytest.fixture(params=CPU_KERNELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Selects an instruction set of the C++ kernels, afterwards again the one before; or the interpreted kernels."""
    if request.param == "triton":
        yield request.param
        return
    before = _native._C.active_isa()
    _native._C.select_isa(request.param)
    yield request.param
    _native._C.select_isa(before)


@pytest.fixture(params=[*CPU_KERNELS, *([] if _native.INTERPRETED else ["plain"])])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set of cross_entropy's kernels, and its implementation for devices without a kernel."""
    before = _native._C.active_isa()
    if request.param == "plain":
        monkeypatch.setattr(operator, "native", lambda name: None)
    elif request.param != "triton":
        _native._C.select_isa(request.param)
    yield request.param
    _native._C.select_isa(before)


@pytest.fixture
def kernels_for_small_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads cross_entropy's small logits, too, to the kernels, where torch's own operator would serve them."""
    monkeypatch.setattr(operator, "PLAIN_MAX_LOGITS", 0)
