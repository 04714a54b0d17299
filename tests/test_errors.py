"""A refusal's text, in each process that it comes to."""

import pickle
from pathlib import Path

from vllm_mxfp4_gfx950.errors import Mxfp4Error


def test_sent_to_another_process() -> None:
    """A pool of processes breaks where an error cannot be unpickled, and nobody reads the text."""
    error = Mxfp4Error("--x", "0", Path("y"), "Leave it out")
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is Mxfp4Error
    assert str(sent) == str(error) == "--x must be 0; got y. Leave it out."
    assert sent.fix == "Leave it out"
