"""What is wrong, in a line. Imports nothing, as torch may be what is broken."""

from __future__ import annotations

import re

RAISED = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Fault)\b.*|.*\berror: .*|FATAL.*|Killed)")
"""A line that ends a traceback, an argument parser's complaint, or what a shell says of a signal."""

LOGGED = re.compile(r"^(\([^()]* pid=\d+\) ?)?((ERROR|CRITICAL) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
"""What vLLM puts before each line of a log, and before each line of a traceback in it."""


class Mxfp4Error(ValueError):
    """Input that cannot be served. Reads: `{name} must be {rule}; got {value}. {fix}.`"""

    def __init__(self, name: str, rule: str, value: object, fix: str) -> None:
        self.name, self.rule, self.value, self.fix = name, rule, value, fix
        super().__init__(f"{name} must be {rule}; got {value}. {fix}.")

    def __reduce__(self) -> tuple[type[Mxfp4Error], tuple[str, str, str, str]]:
        """What it is made of again in another process, to which a rank's error is sent."""
        return type(self), (self.name, self.rule, str(self.value), self.fix)


def brief(error: Exception) -> str:
    """What was raised, in a line: a compiler says first where it was, and last what it met."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def first_error(log: str) -> str:
    """What a program's log says went wrong first; "" where it says nothing of the kind.

    A program of several processes fails in one of them, and the others then say that it is gone. The message
    may go on in indented lines, of which the first is taken, too.
    """
    lines = [LOGGED.sub("", line).rstrip() for line in log.splitlines()]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if RAISED.fullmatch(line):
            return f"{line} {following.strip()}" if following.startswith("  ") else line
    return ""
