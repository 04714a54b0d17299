"""The `vllm-mxfp4` command line."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from vllm_mxfp4_gfx950.errors import Mxfp4Error

COMMANDS = {
    "doctor": "say what is installed, what GPT-OSS needs of it, and which backend would serve it",
    "compile": "compile a model's kernels for gfx950, without a GPU, and show what each takes",
    "verify": "execute them on an emulated gfx950, and compare with float64",
    "predict": "predict what a layer takes on a gfx950, without one, from what its kernels execute",
    "bench": "measure a layer and serving, beside vLLM's own MoE backends",
    "eval": "measure how accurate a path is, and compare it with another one",
    "tune": "time tiles on this machine's GPU, for a table of your own; or rank gfx950's without one",
}
"""Each is a module of `commands` with `add_arguments(parser)` and `run(args)`, which is the exit code."""


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
    for name, summary in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        if name in arguments[:1]:
            try:
                command = importlib.import_module(f"vllm_mxfp4_gfx950.commands.{name}")
            except ModuleNotFoundError as error:
                fix = "Run where vLLM's build for this GPU is"
                missing = Mxfp4Error(str(error.name), "installed", "nothing", fix)
                print(f"vllm-mxfp4 {name}: {missing}", file=sys.stderr)
                return 2
            command.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        exit_code: int = command.run(args)
    except Mxfp4Error as error:
        print(f"vllm-mxfp4 {arguments[0]}: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Left to Python, it would end with 1, and be taken for what the command looked for.
        traceback.print_exc()
        return 2
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
