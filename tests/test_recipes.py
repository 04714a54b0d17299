"""The command lines of docs/recipes.md are taken by vLLM's own parser, and by our checks."""

import re
import shlex

import pytest
from run_python import ROOT

from vllm_mxfp4_gfx950 import settings

LINES = re.findall(r"^    (vllm serve .*)$", (ROOT / "docs/recipes.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_line(line: str) -> None:
    """Every option is vLLM's, it uses one card or a whole node, and the flag is there."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    given = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])
    assert given.quantization == "mxfp4-triton"
    assert given.tensor_parallel_size * given.data_parallel_size in (1, 8)
    assert given.model_tag in ("openai/gpt-oss-20b", "openai/gpt-oss-120b")


def test_unknown_option() -> None:
    """Negative control."""
    assert len(LINES) > 6
    with pytest.raises(SystemExit):
        test_line(LINES[0] + " --data-parallel-sise 8")


def test_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM has no Ray executor on a CPU; where it has one, its workers are sent our variables."""
    from vllm.platforms.cpu import CpuPlatform
    from vllm.ray.ray_env import get_env_vars_to_copy

    assert not CpuPlatform.ray_device_key, "there is one now: add it to WAYS of test_engine_ways.py"
    for name in settings.VARIABLES:
        monkeypatch.setenv(name, "")
    assert set(settings.VARIABLES) <= get_env_vars_to_copy()
