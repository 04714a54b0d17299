"""Unpack the Python sources of the wheels in packages.toml, each under a directory of its own.

    python environments/fetch_packages.py DIRECTORY

What is there already is left alone. An interrupted run leaves whole packages and at most one `.partial-*`.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import tomllib

LOCK = Path(__file__).with_name("packages.toml")
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "-qq", "download", "--no-deps", "--require-hashes"]
# One platform's wheel, and so one hash, on every machine: only its Python sources are read.
ONE_PLATFORM = ["--only-binary=:all:"]
ONE_PLATFORM += [f"--platform=manylinux{glibc}_x86_64" for glibc in ("_2_28", "_2_34", "2014")]


def fetch(package: Path, requirement: str, sha256: str) -> None:
    """Download one wheel, check its hash, and move its sources into place.

    Args:
        package: the directory to make; whatever is there is replaced.
        requirement: name==version.
        sha256: of the wheel.

    Raises:
        CalledProcessError: pip failed, and has said why.
    """
    partial = package.with_name(f".partial-{package.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    pinned = partial / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    subprocess.run([*PIP_DOWNLOAD, *ONE_PLATFORM, "-r", pinned, "-d", partial], check=True)

    sources = partial / "sources"
    with zipfile.ZipFile(next(partial.glob("*.whl"))) as wheel:
        wheel.extractall(sources, [n for n in wheel.namelist() if n.endswith(".py") or ".dist-info/" in n])
    (sources / ".sha256").write_text(sha256)

    if package.is_symlink():
        package.unlink()
    elif package.exists():
        package.rename(partial / "replaced")
    sources.rename(package)
    shutil.rmtree(partial)


def is_current(package: Path, sha256: str) -> bool:
    """Whether this very wheel was unpacked there."""
    mark = package / ".sha256"
    return mark.is_file() and mark.read_text() == sha256


def main(directory: Path) -> int:
    """Bring every package of the lock up to date; the exit code is pip's."""
    for name, lock in tomllib.loads(LOCK.read_text()).items():
        if not is_current(directory / name, lock["sha256"]):
            print(f"fetching {lock['requirement']}", flush=True)
            try:
                fetch(directory / name, **lock)
            except subprocess.CalledProcessError as error:
                return error.returncode
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    sys.exit(main(parser.parse_args().directory))
