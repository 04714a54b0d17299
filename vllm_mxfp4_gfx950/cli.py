"""The `vllm-mxfp4` command line."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from vllm_mxfp4_gfx950 import options
from vllm_mxfp4_gfx950.errors import Mxfp4Error

COMMANDS = {
    "doctor": (
        options.of_doctor,
        "say what is installed, what GPT-OSS needs of it, and which backend would serve it",
    ),
    "compile": (
        options.of_compile,
        "compile a model's kernels for gfx950, without a GPU, and show what each takes",
    ),
    "verify": (options.of_verify, "execute them on an emulated gfx950, and compare with float64"),
    "predict": (
        options.of_predict,
        "predict what a layer takes on a gfx950, without one, from what its kernels execute",
    ),
    "bench": (options.of_bench, "measure a layer and serving, beside vLLM's own MoE backends"),
    "eval": (options.of_eval, "measure how accurate a path is, and compare it with another one"),
    "tune": (
        options.of_tune,
        "time tiles on this machine's GPU, for a table of your own; or rank gfx950's without one",
    ),
}
"""What declares a command's options, and what it is for. Each is a module of `commands` too, in which
`run(args)` returns the exit code."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run its command. No other command's module is imported.

    Args:
        arguments: without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 for success, 1 when the command found a fault, 2 when it came to no verdict:
        what was asked cannot be done, or the command failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="vllm-mxfp4", description="Serve GPT-OSS from MXFP4 on AMD gfx950.")
    subparsers = parser.add_subparsers(metavar="command", required=True)
    for name, (declare, summary) in COMMANDS.items():
        declare(subparsers.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(arguments)
    name = arguments[0]
    try:
        command = importlib.import_module(f"vllm_mxfp4_gfx950.commands.{name}")
        exit_code: int = command.run(args)
    except ModuleNotFoundError as error:
        fix = "Run where vLLM's build for this GPU is"
        told = Mxfp4Error(str(error.name), "installed", "nothing", fix)
    except Mxfp4Error as error:
        told = error
    except Exception:
        # Left to Python, it would end with 1, and be taken for what the command looked for.
        traceback.print_exc()
        return 2
    else:
        return exit_code
    print(f"vllm-mxfp4 {name}: {told}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
