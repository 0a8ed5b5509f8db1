"""Which tests run, and fixtures that several test files share."""

import atexit
import contextlib
import gc
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from random import Random

import pytest
import torch

from fastseg import _native, ops, reference
from fastseg.ops import cross_entropy
from fastseg.ops.convolution import algorithms
from tests.sampling import covering

# The operators with a C++ kernel of their own.
NATIVE_OPERATORS = [operator for name in ops.__all__ if hasattr(operator := getattr(ops, name), "native")]

SMALL_GRID = 12  # cases that a test may have and run them all
LONGEST = ("tests/kernels/test_interpreted.py", "tests/training/")  # of whole runs: what takes longest comes first

with contextlib.suppress(ModuleNotFoundError):  # benchmarks/ is part of a checkout alone
    importlib.import_module("benchmarks.harness.memory")  # before test files start threads: see its `unknown`

if _native.INTERPRETED:
    from tests.kernels import triton_interpreter

    triton_interpreter.prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=["cpu", "cuda"], default="cpu", help="where tests make their tensors")
    parser.addoption("--tf32", choices=["on", "off"], default="on", help="torch's setting for float32 convolutions")
    parser.addoption("--full", action="store_const", const=0, dest="strength", help="run all cases of every test")
    parser.addoption(
        "--strength", type=int, dest="strength", metavar="T",
        help="of a test's cases, run so many that any T parameters' values that meet in a case meet in one that runs; "
        f"2, the default, leaves tests of fewer than {SMALL_GRID} cases whole",
    )  # fmt: skip
    parser.addoption("--part", metavar="K/N", help="run the Kth of N parts of the tests, K = 1, ..., N")
    parser.addoption("--most", type=int, metavar="N", help="of a test's cases, run at most N, evenly spaced")
    parser.addoption("--shuffled", action="store_true", help="run tests in a random order, the same in every run")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Whole runs take two processes of one thread each, where pytest-xdist is installed; ``-n 0`` takes this one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses, config.option.dist = 2, "loadfile"  # fixtures of a file are made once
        config.option.loadscopereorder = False  # `LONGEST` comes first
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ["OMP_WAIT_POLICY"] = "passive"  # more threads, where tests want them, don't spin on the other's core
        # What `benchmarks.harness.memory` would set comes too late in a worker, which has a thread from the start.
        os.environ["MALLOC_ARENA_MAX"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    if config.option.strength is None:
        config.option.strength = 0 if any("::" in name for name in config.args) else 2  # what is named runs
    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no CUDA device")
        torch.set_default_device("cuda")  # before test files are imported: they hold tensors
        torch.backends.cudnn.allow_tf32 = config.getoption("--tf32") == "on"
        torch.backends.cudnn.deterministic = True  # the library's part of what is compared bit by bit


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """On a GPU, whose time may be over before the run is, a failure's name is printed at once."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ and torch.get_default_device().type == "cuda":
        print(f"\nFAILED {report.nodeid}", flush=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that need a CUDA device where there is none, those of ``--full``, and other parts' tests."""
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
    kept = [item for item in items if not config.option.strength or item.get_closest_marker("full") is None]
    if most := config.getoption("--most"):
        cases = defaultdict[str, list[pytest.Item]](list)
        for item in kept:
            cases[item.nodeid.partition("[")[0]].append(item)
        chosen = {item for items in cases.values() for item in items[:: -(-len(items) // most)]}
        kept = [item for item in kept if item in chosen]
    if part := config.getoption("--part"):
        number, parts = map(int, part.split("/"))
        kept = kept[number - 1 :: parts]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[*{*items} - {*kept}])
    items[:] = sorted(kept, key=lambda item: not item.nodeid.startswith(LONGEST))
    if config.getoption("--shuffled"):
        Random(0).shuffle(items)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Little that is made until the tests begin is garbage."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """All there is now stays: garbage collections, which tests of memory ask for, would look at it half a second."""
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker has reported all it has to: Python would take it apart for four seconds, object by object.

    Elsewhere, extension modules that count their objects (nanobind) miss none.
    """
    if hasattr(config, "workerinput"):
        atexit.register(os._exit, 0)  # what is registered last runs first: after xdist has sent its reports
    else:
        gc.unfreeze()


@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> Iterator[None]:
    """What the tensors' device may run: the C++ kernels' instruction sets, the interpreted kernels, or a GPU's.

    Then, when all other parameters are known, the sample of the cases. pytest has no hook between the parameters and
    the items, whose making takes most of the time that the sample saves: hence the private name, which pytest 8 and 9
    share. In ``indices`` are the numbers of a case's values within their parameters.
    """
    if metafunc.config.getoption("--device") == "cuda":
        kernels, others = ["triton"], []
    elif _native.INTERPRETED:
        kernels, others = ["triton-interpreted"], []
    else:
        kernels, others = _native._C.runnable_isas(), ["plain"]
    if "isa" in metafunc.fixturenames:
        with_others = "implementation" in metafunc.fixturenames
        metafunc.parametrize("isa", [*kernels, *(others if with_others else [])], indirect=True)
    yield
    strength = metafunc.config.option.strength
    if strength and (mark := metafunc.definition.get_closest_marker("strength")):
        strength = min(strength, *mark.args)
    calls = [call for call in metafunc._calls if not strength or all(mark.name != "full" for mark in call.marks)]
    if strength == 1 or (strength and len(calls) >= SMALL_GRID):
        calls = [calls[row] for row in covering([call.indices for call in calls], strength, metafunc.function.__name__)]
    if calls:  # else it has none, or none but those of --full, which are left out later
        metafunc._calls = calls


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run, in whatever order the tests come."""
    if torch.get_default_device().type == "cpu":
        torch.default_generator.manual_seed(0)  # torch.manual_seed formats the stack for each kind of absent GPU: 1 ms
    else:
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


@pytest.fixture(autouse=True, scope="session")
def kernels_for_small_convolutions() -> Iterator[None]:
    """Leads conv2d's small calls, too, to the kernels: in all tests, whose networks are small."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(algorithms, "CONV2D_MIN_PRODUCTS", 0)
        yield


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads; afterwards it is again the one before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
