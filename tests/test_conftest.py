"""The guards of conftest.py, each seen to work and to let pass what it should."""

from pathlib import Path

import pytest
import torch

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
