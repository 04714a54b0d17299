"""What every test gets: no network, NaN in memory that nothing has written, an end, and no silent skips."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported. Small layers gain nothing from several threads, which wait for each other where
# the machine is busy; and so no result depends on the number of cores.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from patience import Watch

PACKAGES = Path(__file__).parents[1] / ".venv/packages"
WATCH = pytest.StashKey[Watch]()
FAILED = pytest.StashKey[dict[int, tuple[BaseException, str]]]()
"""What failed and the test that it failed first, by the exception's id; it is kept, so that its id is."""

# What the caller has set for servers of their own. Tests start others, and read logs.
for name in [name for name in os.environ if name.startswith(("VLLM_", "AITER_"))]:
    del os.environ[name]
# Before anything imports vLLM or huggingface_hub, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: half of the start-up time


@pytest.fixture(scope="session")
def packages() -> Path:
    """The directory with the unpacked packages of environments/packages.toml."""
    if not PACKAGES.is_dir():
        pytest.skip("needs .venv/packages: python environments/fetch_packages.py .venv/packages")
    return PACKAGES


@pytest.fixture(autouse=True)
def nan_in_new_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every `torch.empty` with NaN, or the largest integer.

    Not in `engine` tests, as vLLM is free to compute on memory it then ignores, nor in `gpu` tests, as the
    switch also selects other CUDA kernels.
    """
    wanted = not any(request.node.get_closest_marker(name) for name in ("engine", "gpu"))
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switches that the Makefile sets."""
    parser.addoption("--aiter", type=Path, help="a directory with aiter/, for the tests of its own source")
    parser.addoption("--no-skips", action="store_true", help="a skip fails, but for `gpu` tests")
    parser.addini("idle_s", "seconds for which a test and its processes may do nothing")
    parser.addini("cpu_s", "seconds of CPU time for them; ten times as many if marked `emulate` or `load`")
    parser.addini("look_s", "seconds between two looks at them")


def pytest_configure(config: pytest.Config) -> None:
    """Begin to watch."""
    config.stash[WATCH] = Watch(float(config.getini("look_s")))
    config.stash[FAILED] = {}


@pytest.fixture(scope="session")
def aiter_source(request: pytest.FixtureRequest) -> Path:
    """The directory with aiter/."""
    source: Path = request.config.getoption("aiter").resolve()
    return source


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs aiter's source where there is none, and begin with the files that take longest.

    So two workers, which take a file each, end together.
    """
    if config.getoption("aiter") is None:
        left_out = [item for item in items if item.get_closest_marker("aiter")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    long = {item.path for item in items if any(map(item.get_closest_marker, ("compile", "engine")))}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """A test's fixtures end."""
    with _watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A test ends."""
    with _watched(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """And what follows it."""
    with _watched(item):
        return (yield)


def _watched(item: pytest.Item) -> contextlib.AbstractContextManager[None]:
    if item.config.getoption("usepdb"):
        return contextlib.nullcontext()
    long = any(item.get_closest_marker(name) for name in ("emulate", "load"))
    idle_s, cpu_s = (float(item.config.getini(name)) for name in ("idle_s", "cpu_s"))
    return item.config.stash[WATCH].over(idle_s, cpu_s * (10 if long else 1))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Turn a test's skip into a failure, and what has failed another test already into a skip.

    Whatever tests share, a fixture or what `run_python.once` keeps, fails all of them with one exception.
    """
    report = yield
    if item.config.getoption("no_skips") and not item.get_closest_marker("gpu"):
        _refuse_skip(report)
    if report.failed and call.excinfo:
        error = call.excinfo.value
        _, first = item.config.stash[FAILED].setdefault(id(error), (error, item.nodeid))
        if first != item.nodeid:
            report.outcome = "skipped"
            report.longrepr = (*item.location[:2], f"what it shares with {first} failed there")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """Turn a module's skip into a failure."""
    report = yield
    if collector.config.getoption("no_skips"):
        _refuse_skip(report)
    return report


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"--no-skips: {reason}"
