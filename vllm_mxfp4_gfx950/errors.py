"""What is wrong, in a line. Imports nothing, as torch may be what is broken."""

from __future__ import annotations


class Mxfp4Error(ValueError):
    """Input that cannot be served. Reads: `{name} must be {rule}; got {value}. {fix}.`"""

    def __init__(self, name: str, rule: str, value: object, fix: str) -> None:
        super().__init__(f"{name} must be {rule}; got {value}. {fix}.")


def brief(error: Exception) -> str:
    """What was raised, in a line: a compiler says first where it was, and last what it met."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
