"""Fixtures that several test files share."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch

from fastseg import _native, ops, reference
from fastseg.ops import cross_entropy
from fastseg.ops.convolution import algorithms

# The operators with a C++ kernel of their own.
NATIVE_OPERATORS = [operator for name in ops.__all__ if hasattr(operator := getattr(ops, name), "native")]

if _native.INTERPRETED:
    from tests.kernels import triton_interpreter

    triton_interpreter.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests make their tensors")
    parser.addoption("--tf32", choices=["on", "off"], default="on", help="torch's setting for float32 convolutions")
    parser.addoption("--every", type=int, default=1, metavar="N", help="run every Nth case of each test alone")
    parser.addoption("--covering", action="store_true", help="run cases in which all pairs of parameters' values occur")
    parser.addoption("--shuffled", action="store_true", help="run tests in a random order, the same in every run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")
        torch.set_default_device("cuda")  # before test files are imported: they hold tensors
        torch.backends.cudnn.allow_tf32 = config.getoption("--tf32") == "on"
        torch.backends.cudnn.deterministic = True  # the library's part of what is compared bit by bit


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that need a CUDA device where there is none, and what ``--every`` leaves out."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    every, seen, kept = config.getoption("--every"), Counter[str](), []
    for item in items:
        name = item.nodeid.partition("[")[0]
        if seen[name] % every == 0:
            kept.append(item)
        seen[name] += 1
    if config.getoption("--covering"):
        kept = covering(kept)
    if config.getoption("--shuffled"):
        Random(0).shuffle(kept)
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """Of each test's cases so many, drawn at random, that every pair of two parameters' values occurs in one."""
    drawn, seen = list(items), defaultdict[str, set[Any]](set)
    Random(0).shuffle(drawn)
    kept = set()
    for item in drawn:
        values = (
            [(name, id(value)) for name, value in item.callspec.params.items()] if hasattr(item, "callspec") else []
        )
        pairs = {*itertools.combinations(values, 2), *values, None}
        found = seen[item.nodeid.partition("[")[0]]
        if not pairs <= found:
            found |= pairs
            kept.add(item)
    return [item for item in items if item in kept]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What the tensors' device may run: the C++ kernels' instruction sets, the interpreted kernels, or a GPU's."""
    if metafunc.config.getoption("--device") == "cuda":
        kernels, others = ["triton"], []
    elif _native.INTERPRETED:
        kernels, others = ["triton-interpreted"], []
    else:
        kernels, others = _native._C.runnable_isas(), ["plain"]
    if "isa" in metafunc.fixturenames:
        with_others = "implementation" in metafunc.fixturenames
        metafunc.parametrize("isa", [*kernels, *(others if with_others else [])], indirect=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run, in whatever order the tests come."""
    torch.manual_seed(0)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the C++ kernels, afterwards again the one before; elsewhere the Triton kernels."""
    before = _native._C.active_isa()
    if request.param in _native._C.runnable_isas():
        _native._C.select_isa(request.param)
    yield request.param
    _native._C.select_isa(before)


@pytest.fixture
def implementation(isa: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """As `isa`, for `NATIVE_OPERATORS`; on a CPU their implementations for devices without a kernel as well."""
    if isa == "plain":
        for operator in NATIVE_OPERATORS:
            monkeypatch.setattr(operator, "native", lambda name: None)
    return isa


@pytest.fixture
def kernels_for_small_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads cross_entropy's small logits, too, to the kernels, where torch's own operator would serve them."""
    monkeypatch.setattr(cross_entropy, "PLAIN_MAX_LOGITS", 0)


@pytest.fixture
def kernels_for_small_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads relu_pool2d's small maps, too, to the kernels."""
    monkeypatch.setattr(algorithms, "PLAIN_POOL_MAX_VALUES", 0)
    monkeypatch.setattr(algorithms, "PLAIN_POOL_MAX_VALUES_CHANNELS_LAST", 0)


@pytest.fixture
def plain_upsampling_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PyTorch upsamples on a CPU: there it copies an axis that keeps its size, and so do the kernels.

    On a GPU it multiplies the neighbours along it by zero, which makes NaN of infinities.
    """
    upsample = reference.upsample
    if torch.get_default_device().type == "cuda":
        monkeypatch.setattr(reference, "upsample", lambda input, *grid: upsample(input.cpu(), *grid).to(input.device))


@pytest.fixture(autouse=True)
def kernels_for_small_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leads conv2d's small calls, too, to the kernels: in all tests, whose networks are small."""
    monkeypatch.setattr(algorithms, "CONV2D_MIN_PRODUCTS", 0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; afterwards it is again the one before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
