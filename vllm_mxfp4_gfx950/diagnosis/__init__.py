"""What is right and what is wrong with an installation, a machine and a model, for `doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mxfp4_gfx950.errors import Mxfp4Error


@dataclass(frozen=True)
class Check:
    """One line of the answer.

    Args:
        ok: False when GPT-OSS cannot be served because of this.
        what: the piece.
        found: what is here.
        needed: what has to be.
        fix: what to do when it is not ok.
    """

    ok: bool
    what: str
    found: str
    needed: str
    fix: str = ""


def refusal(what: str, error: Mxfp4Error) -> Check:
    """The line of something that a server would refuse with this error."""
    return Check(False, what, f"{error.name}: {error.value}", error.rule, error.fix)
