"""Install the packages of lock files with pip, and say every few seconds how far that is.

    python environments/install.py .venv --no-compile -r environments/tools.txt

pip itself is silent for minutes, first while it downloads and then while it unpacks.
"""

import argparse
import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

SECONDS = 10
"""Between two lines."""

LINES = 20
"""Of what pip said, where it failed."""


def main(venv: Path, arguments: list[str]) -> int:
    """Run pip in a virtual environment; the exit code is pip's."""
    locks = [Path(value) for option, value in itertools.pairwise(arguments) if option == "-r"]
    wanted = sum(line[:1].isalnum() for lock in locks for line in lock.read_text().splitlines())
    command = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check", "--no-color", "install"]
    began = time.monotonic()
    fetched, unpacking = 0, False
    said: list[str] = []
    with subprocess.Popen(
        [*command, "--progress-bar=off", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as pip:
        done = threading.Event()

        def report() -> None:
            while not done.wait(SECONDS):
                unpacked = sum(1 for _ in venv.glob("lib/python*/site-packages/*.dist-info"))
                so_far = f"unpacked {unpacked}" if unpacking else f"fetched {fetched}"
                seconds = time.monotonic() - began
                print(f"  after {seconds:3.0f} s: {so_far} of {wanted} packages", flush=True)

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        for line in pip.stdout or ():
            said.append(line)
            fetched += line.startswith("Collecting ")
            unpacking = unpacking or line.startswith("Installing collected packages")
        done.set()
        thread.join()
    if pip.returncode:
        print("".join(said[-LINES:]), end="", file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("venv", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of pip install")
    args = parser.parse_args()
    sys.exit(main(args.venv, args.arguments))
