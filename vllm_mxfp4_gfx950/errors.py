"""An exception in one line, for a log or a table. Imports nothing, as torch may be what is broken."""


def brief(error: Exception) -> str:
    """What was raised, in a line: a compiler says first where it was, and last what it met."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
