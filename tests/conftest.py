"""What every test gets: no network, NaN in memory that nothing has written, and no silent skips."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGES = Path(__file__).parents[1] / ".venv/packages"

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small layers gain nothing from several, which wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch that `make test` sets."""
    parser.addoption("--no-skips", action="store_true", help="a skip fails, but for `gpu` tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a test's skip into a failure."""
    report = yield
    if item.config.getoption("no_skips") and not item.get_closest_marker("gpu"):
        _refuse_skip(report)
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
