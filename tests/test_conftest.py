"""The guards of conftest.py, each seen to work and to let pass what it should."""

from pathlib import Path

import pytest
import torch
from patience import Progress
from run_python import SUPPORT

pytest_plugins = "pytester"

SKIPPED = """
    import pytest

    def test_needs_something():
        pytest.skip("needs something")

    @pytest.mark.gpu
    def test_needs_a_gpu():
        pytest.skip("needs a GPU")

    @pytest.mark.xfail
    def test_fails_as_expected():
        raise AssertionError
"""
MODULE_SKIPPED = """
    import pytest

    pytest.importorskip("no_such_module")
"""


@pytest.fixture
def suite(pytester: pytest.Pytester) -> pytest.Pytester:
    """An empty suite with our conftest.py and configuration."""
    tests = Path(__file__).parent
    pytester.makeconftest((tests / "conftest.py").read_text())
    pytester.makepyprojecttoml((tests.parent / "pyproject.toml").read_text())
    return pytester


def test_new_memory_is_nan() -> None:
    """A tensor that nothing has written."""
    assert torch.empty(1000).isnan().all()


@pytest.mark.engine
def test_new_memory_is_as_it_comes_in_engine_tests() -> None:
    """The switch is off there."""
    assert not torch.are_deterministic_algorithms_enabled()


def test_skips_fail_in_make_test(suite: pytest.Pytester) -> None:
    """All but the GPU's, and expected failures stay what they are."""
    suite.makepyfile(SKIPPED)
    suite.runpytest_inprocess(suite.path).assert_outcomes(skipped=2, xfailed=1)
    result = suite.runpytest_inprocess("--no-skips", suite.path)
    result.assert_outcomes(failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines("--no-skips: Skipped: needs something")


def test_module_skips_fail_in_make_test(suite: pytest.Pytester) -> None:
    """A skip before any test is collected."""
    suite.makepyfile(MODULE_SKIPPED)
    suite.runpytest_inprocess(suite.path).assert_outcomes(skipped=1)
    suite.runpytest_inprocess("--no-skips", suite.path).assert_outcomes(errors=1)


HANGS = """
    import pytest, threading
    from run_python import once, run_python

    def test_sound():
        pass

    def test_waits():
        threading.Event().wait()

    def test_computes():
        while True:
            pass

    def test_waits_for_a_process():
        run_python(["-c", "import threading; threading.Event().wait()"])

    @pytest.fixture(scope="module")
    def process():
        run_python(["-c", "while True: pass"])

    def test_first(process):
        pass

    def test_second(process):
        pass

    @once
    def shared():
        raise RuntimeError("cause")

    @pytest.mark.parametrize("number", range(3))
    def test_shares(number):
        shared()
"""


def test_what_hangs_ends(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it waits or computes, itself or a process; and what tests share fails once, and says why."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    suite.makepyfile(HANGS)
    limits = [f"--override-ini={limit}" for limit in ("idle_s=2", "cpu_s=4", "look_s=0.2")]
    result = suite.runpytest_subprocess(*limits, suite.path)
    result.assert_outcomes(passed=1, failed=4, errors=1, skipped=3)
    for reason in ("did nothing for 2 s", "computed for 4 s of CPU time", "RuntimeError: cause"):
        result.stdout.fnmatch_lines(f"*{reason}*")
    result.stdout.fnmatch_lines("SKIPPED * what it shares with *::test_first failed there")
    result.stdout.fnmatch_lines("SKIPPED * what it shares with *::test_shares?0? failed there")


@pytest.mark.parametrize(
    ("cpu", "hang"),
    [
        pytest.param([0.0, 0.0, 0.0], "did nothing for 300 s", id="waits"),
        pytest.param([0.0, 0.5, 1.0], "did nothing for 300 s", id="polls"),
        pytest.param([0.0, 5.0, 10.0], "", id="starved"),
        pytest.param([9.0, 5.0, 5.0], "", id="process-gone"),
        pytest.param(
            [0.0, 900.0, 1801.0], "computed for 1800 s of CPU time and came to no end", id="endless"
        ),
    ],
)
def test_hang(cpu: list[float], hang: str) -> None:
    """After 200 s, and after another 200."""
    progress = Progress(300, 1800, 0, cpu[0])
    assert progress.hang(200, cpu[1]) == ""
    assert progress.hang(400, cpu[2]) == hang


def test_two_workers(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make test` runs the suite, a skip fails as well."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))
    suite.makepyfile(SKIPPED)
    workers = ("--numprocesses=2", "--dist=loadfile")
    suite.runpytest_subprocess(*workers, "--no-skips", suite.path).assert_outcomes(
        failed=1, skipped=1, xfailed=1
    )
