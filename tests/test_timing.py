"""Times of calls: twice the work takes twice as long."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from vllm_mxfp4_gfx950.timing import Calls


def test_calls_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call's share of the work, once for each replay; the first call's result is the replay's."""
    numbers: list[int] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 0.05 * len(numbers))  # Each call takes 0.05 s.

    def call(number: int) -> int:
        numbers.append(number)
        return len(numbers)

    calls = Calls(call, 3, torch.device("cpu"))
    assert calls.replay() == 4
    times = calls.microseconds(2)
    assert numbers == [0, 1, 2] * 5
    assert times == pytest.approx([50_000, 50_000])


def test_launch_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of so many calls, which take turns."""
    numbers: list[int] = []
    monkeypatch.setattr(time, "perf_counter", lambda: 0.05 * sum(numbers))

    def call(number: int) -> None:
        numbers.append(number + 1)

    calls = Calls(call, 3, torch.device("cpu"), alike=True)
    assert calls.launch_us(5) == pytest.approx(100_000)
    assert numbers == [1, 1, 2, 3, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("in_graph", "counts"), [(True, False), (False, True)])
def test_time_of_the_cpu(in_graph: bool, counts: bool) -> None:
    """It counts where there is no graph; and so does the GPU's, which is 1 ms here."""
    a = torch.zeros(1 << 29, device="cuda")

    def call(_: int) -> None:
        a.mul_(2.0)
        time.sleep(0.01)

    calls = Calls(call, 2, a.device, in_graph=in_graph)
    (us, *_) = calls.microseconds()
    assert us > 500
    assert (us > 10_000) == counts
    assert calls.launch_us(3) > 10_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_calls_on_a_gpu() -> None:
    """And the work is there: a copy is not faster than memory."""
    times = []
    for mebibytes in (512, 1024):
        a, b = (torch.zeros(mebibytes << 18, device="cuda") for _ in range(2))
        calls = Calls(lambda _, a=a, b=b: torch.mul(a, 2.0, out=b), 2, a.device)
        times.append(statistics.median(calls.microseconds()))
    assert times[1] / times[0] == pytest.approx(2, rel=0.1)
    assert 2 * (1 << 30) / times[1] / 1e6 < 10
