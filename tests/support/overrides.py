"""Whether a class of ours takes what a framework's base class says that it will be called with."""

import inspect
from collections.abc import Callable


def check_overrides(ours: type, base: type) -> None:
    """Every method must be there, and take what the base class's takes, by position and by name."""
    assert not inspect.isabstract(ours), ours.__abstractmethods__
    for name in vars(ours):
        if not name.startswith("_") and inspect.isroutine(getattr(base, name, None)):
            check_takes(getattr(ours, name), getattr(base, name))


def check_takes(ours: Callable[..., object], theirs: Callable[..., object], *before: str) -> None:
    """A function must take what another does, by position and by name.

    Args:
        ours: it.
        theirs: the other.
        before: what it is given before all that, by position.
    """
    signature = without_self(ours)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    called = without_self(theirs).parameters.values()
    names = [parameter.name for parameter in called if parameter.kind in kinds]
    try:
        signature.bind(*before, *names)
        signature.bind(*before, **dict.fromkeys(names))
    except TypeError as error:
        raise TypeError(f"{ours.__qualname__}{signature} must take {names}") from error


def without_self(method: Callable[..., object]) -> inspect.Signature:
    """The signature that a caller of a method sees, whether it is bound or not."""
    signature = inspect.signature(method)
    parameters = [parameter for name, parameter in signature.parameters.items() if name != "self"]
    return signature.replace(parameters=parameters)
