"""`vllm-mxfp4 bench`: what is timed is right, what is counted is there, what ran is what was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
import tiny_checkpoint
import torch
from engine import FLAG
from test_self_check import backend, choose_from
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import cli, options, self_check, serving, timing
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.bench import layer, report, serve, vllm_client, vllm_layers, vllm_worker
from vllm_mxfp4_gfx950.bench.layer import Layer
from vllm_mxfp4_gfx950.commands import bench
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.process import free_port
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import TABLES_VAR, Settings
from vllm_mxfp4_gfx950.timing import Calls

CPU = torch.device("cpu")
SHAPE = make_shape(4, 2, 64, 32)
REACHED = layer.Speeds(copy=1e9, multiply=1e12)
SERVED = f"--enforce-eager --kv-cache-memory-bytes {2**26}"
OURS = layer.ours


def without_w2_bias(weights: MoeWeights, shape: MoeShape) -> Layer:
    """Our layer, with a fault that is easily made."""
    return OURS(dataclasses.replace(weights, w2_bias=torch.zeros_like(weights.w2_bias)), shape)


def right_at_first(weights: MoeWeights, shape: MoeShape) -> Layer:
    """A layer that goes wrong when its calls are made again."""
    run, calls = layer.ours(weights, shape), 0

    def call(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return run(x, logits) * (1 if calls <= layer.CALLS // layer.copies(shape, CPU) else 1.5)

    return call


def stops_at_five_tokens(weights: MoeWeights, shape: MoeShape) -> Layer:
    """A layer that cannot serve every batch."""
    run = layer.ours(weights, shape)

    def call(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if len(x) == 5:
            raise torch.OutOfMemoryError("out of memory\nand more")
        return run(x, logits)

    return call


def cannot_be_built(_weights: MoeWeights, _shape: MoeShape) -> Layer:
    """What a missing package does."""
    raise ModuleNotFoundError("No module named 'vllm'")


@pytest.fixture(scope="module", name="checkpoint")
def fixture_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-OSS."""
    model = TinyGptOss(experts=4, topk=2, hidden=64, intermediate=32)
    return tiny_checkpoint.write(model, tmp_path_factory.mktemp("bench") / "tiny")


def test_work_is_that_of_the_tensors() -> None:
    """Bytes and FLOPs, against those of the tensors that hand-made routings touch."""
    weights = random_weights(SHAPE, 0)
    logits = torch.full((2, 3, 4), -5.0)
    for call, token, experts in ((0, 0, (0, 1)), (0, 1, (0, 1)), (0, 2, (1, 0)), (1, 0, (2, 3))):
        logits[call, token, list(experts)] = torch.tensor([3.0, 2.0])
    logits[1, 1:, :2] = 4.0  # All four experts in the second call, two in the first.
    each = sum(getattr(weights, name)[0].nbytes for name in ("w13", "w13_scale", "w2", "w2_scale"))
    matmuls = 2 * (2 * SHAPE.intermediate) * SHAPE.hidden + 2 * SHAPE.hidden * SHAPE.intermediate
    assert layer.work(SHAPE, list(logits)) == ((2 + 4) / 2 * each, 3 * 2 * matmuls)
    assert layer.expert_bytes(layer_shape("gpt-oss-20b")) == 13_219_200


def test_rows() -> None:
    """Each backend has its times where it is right, and its reason where it is not; none stops the others."""
    builders = {
        "ours": layer.ours,
        "broken": without_w2_bias,
        "late": right_at_first,
        "stops": stops_at_five_tokens,
        "absent": cannot_be_built,
    }
    one, five, last = layer.measure(SHAPE, [1, 5, 4], builders, REACHED, CPU)
    assert [row.tokens for row in (one, five, last)] == [1, 5, 4]
    for row in (one, five, last):
        assert set(row.us) == set(row.frobenius) == {"ours", "stops"} - set(row.failed)
        assert all(len(times) == 2 * timing.REPLAYS and min(times) > 0 for times in row.us.values())
        assert "is allowed" in row.failed["broken"]
        assert "is allowed" in one.failed["late"]  # Later it is wrong from the first call on.
        assert row.failed["absent"] == "ModuleNotFoundError: No module named 'vllm'"
        assert row.frobenius["ours"] < 0.01
        assert row.host_us == {}
    assert five.failed["stops"] == "OutOfMemoryError: out of memory ... and more"
    assert one.layer == str(SHAPE)
    assert one.weight_bytes == 2 * layer.expert_bytes(SHAPE)
    assert one.floor_us == 1e6 * one.weight_bytes / 1e9


def test_host_column() -> None:
    """The time of ours to launch a call is the last of a row."""
    us, host = {"ours": [10.0], "TRITON": [20.0]}, {"ours": 31.4, "TRITON": 62.6}
    row = layer.Row("E=8 I=32", 4, 1e6, 1e9, 5.0, us, host, {"ours": 1e-3, "TRITON": 1e-3}, {}, 1.0)
    assert bench.layer_line(row, ["ours", "TRITON"]).split()[-3:] == ["2.00", "0.500", "31.4"]
    on_a_cpu = dataclasses.replace(row, host_us={})
    assert bench.layer_line(on_a_cpu, ["ours", "TRITON"]).split()[-2:] == ["2.00", "0.500"]


def test_layers_take_turns() -> None:
    """No call meets the layer of the call before it, from replay to replay as well."""
    met: list[int] = []

    def numbered(number: int) -> Layer:
        return lambda x, _logits: (met.append(number), x)[1]

    some = [numbered(number) for number in range(layer.copies(SHAPE, CPU))]
    batches = [random_tokens(SHAPE, 1, seed) for seed in range(layer.CALLS)]
    calls = layer.in_turn(some, batches, CPU, in_graph=True)
    met.clear()
    calls.microseconds(2)
    assert len(met) == 3 * layer.CALLS
    assert all(before != after for before, after in itertools.pairwise(met))


def test_bench_layer(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command, on this CPU: the table, the report and the plot say the same."""
    file, plot = tmp_path / "layer.json", tmp_path / "layer.svg"
    arguments = ["--model", str(checkpoint / "config.json"), "--tokens", "1", "6"]
    assert cli.main(["bench", "layer", *arguments, "--json", str(file), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    done = report.read(file)
    assert [row["tokens"] for row in done["rows"]] == [1, 6]
    for row in done["rows"]:
        moved, multiplied = row["weight_bytes"] / done["copy_bytes_per_s"], row["flops"] / done["flops_per_s"]
        assert row["floor_us"] == pytest.approx(1e6 * max(moved, multiplied))
        median = statistics.median(row["us"]["ours"])
        line = next(each for each in printed.splitlines() if each.startswith(f"{row['tokens']:6} "))
        half = (max(row["us"]["ours"]) - min(row["us"]["ours"])) / 2
        assert f"{row['floor_us']:8.1f}{median:9.1f} ±{half / median:5.1%} " in line
        assert line.endswith(f"{median / row['floor_us']:10.2f}")
    assert {"ours", "floor", str(SHAPE)} <= set(re.findall("<!-- (.+) -->", plot.read_text()))


@pytest.mark.parametrize(("captured", "graphs"), [([], [True, True]), (["--captured", "5"], [True, False])])
def test_bench_layer_as_captured(
    captured: list[str],
    graphs: list[bool],
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Batches without a graph are timed without one, and what serves is chosen so."""
    made: list[bool] = []

    class Noted(Calls):
        def __init__(self, *arguments: Any, in_graph: bool = True) -> None:
            made.append(in_graph)
            super().__init__(*arguments, in_graph=in_graph)

    limits: list[int | None] = []
    served = layer.as_served
    monkeypatch.setattr(layer, "as_served", lambda *given: (limits.append(given[2]), served(*given))[1])
    monkeypatch.setattr(layer, "speeds", lambda _: layer.Speeds(1e9, 1e9))
    monkeypatch.setattr(layer, "Calls", Noted)
    arguments = ["--model", str(checkpoint / "config.json"), "--tokens", "5", "6", "--peers", *captured]
    assert cli.main(["bench", "layer", *arguments]) == 0
    assert made == graphs
    assert set(limits) == ({5} if captured else {None})
    assert ("above 5 tokens without a graph" in capsys.readouterr().out) == bool(captured)


@pytest.mark.parametrize(
    ("fault", "text"), [(without_w2_bias, " is allowed; "), (cannot_be_built, "No module named 'vllm'")]
)
def test_bench_layer_refuses_a_wrong_layer(
    fault: layer.Builder,
    text: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Negative control: no time, the reason, and exit code 1."""
    monkeypatch.setattr(layer, "ours", lambda weights, shape, captured: fault(weights, shape))
    arguments = ["--model", str(checkpoint / "config.json"), "--tokens", "1", "--peers"]
    assert cli.main(["bench", "layer", *arguments]) == 1
    *_, row, reason, _ = capsys.readouterr().out.splitlines()
    assert row.endswith("  FAIL")
    assert "±" not in row
    assert reason.startswith("       ours: ")
    assert text in reason


def test_plots_show_the_medians(tmp_path: Path) -> None:
    """Lines and bars, from the figures that were drawn."""
    from matplotlib.figure import Figure

    figure = Figure()
    rows: list[dict[str, Any]] = [
        {"layer": "E=8 H=64", "tokens": tokens, "floor_us": 5.0, "us": {"ours": [7.0, 9.0, 8.0 * tokens]}}
        for tokens in (4, 1)
    ]
    report.draw_layers(figure, [*rows, rows[0] | {"layer": "E=8 H=32", "us": {"MARLIN": [3.0]}}])
    lines = [[(line.get_label(), *line.get_ydata()) for line in panel.lines] for panel in figure.axes]
    assert lines == [[("floor", 5.0, 5.0), ("ours", 8.0, 9.0)], [("floor", 5.0), ("MARLIN", 3.0)]]
    assert [panel.get_title() for panel in figure.axes] == ["E=8 H=64", "E=8 H=32"]

    figure = Figure()
    load = {"model": "m", "routing": "spread", "batch": 1, "input": 2, "output": 3}
    rows = [
        load | {"engine": name, "tokens_per_s": [2.0, 4.0, rate]} for name, rate in (("a", 9.0), ("b", 3.0))
    ]
    report.draw_serving(figure, [*rows, rows[0] | {"batch": 2}])
    bars = [[bar.get_height() for bar in panel.patches] for panel in figure.axes]
    assert bars == [[4.0, 3.0], [4.0]]

    file = tmp_path / "report.json"
    facts = {"device": "CPU", "versions": {}, "rows": rows}
    with pytest.raises(Mxfp4Error, match=r"the reports must be all of one kind; got layer and serve\. "):
        report.draw([facts | {"bench": "layer"}, facts | {"bench": "serve"}], tmp_path / "x.png")
    report.write(file, facts | {"bench": "serve"})
    assert cli.main(["bench", "plot", str(file), "--plot", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("other", [{"device": "another"}, {"versions": {"triton": "3.8.0"}}], ids=str)
def test_plot_of_two_machines(
    other: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports of one place are drawn as one; those of different devices or versions are not."""
    files = [tmp_path / f"{name}.json" for name in "abc"]
    row = {"layer": "E=8", "tokens": 1, "floor_us": 1.0, "us": {"ours": [2.0]}}
    one = {"bench": "layer", "device": "CPU", "versions": {"triton": "3.6.0"}, "rows": [row]}
    for file, content in zip(files, (one, one | {"rows": [row | {"tokens": 2}]}, one | other), strict=True):
        report.write(file, content)
    plot = ["--plot", str(tmp_path / "x.svg")]
    assert cli.main(["bench", "plot", *map(str, files[:2]), *plot]) == 0
    assert cli.main(["bench", "plot", *map(str, files), *plot]) == 2
    assert "the reports must be all of one device and the same versions; got " in capsys.readouterr().err


ROWS: dict[str, dict[str, Any]] = {
    "layer": {"layer": "E=8", "tokens": 1, "floor_us": 1.0, "us": {"ours": [2.0]}},
    "serve": {
        "engine": "ours", "model": "m", "routing": "alike", "batch": 1, "input": 2, "output": 3,
        "tokens_per_s": [4.0],
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "fault", "got"),
    [
        ("layer", "bench", "another JSON"),
        ("layer", "device", "one without device or versions"),
        ("layer", "versions", "one without device or versions"),
        ("layer", "rows", "one without rows"),
        ("layer", "layer", "one with a row without layer"),
        ("layer", "us", "one with a row without us"),
        ("serve", "routing", "one with a row without routing"),
    ],
)
def test_incomplete_report(kind: str, fault: str, got: str, tmp_path: Path) -> None:
    """Refused when it is read, with what it lacks, and whole it is taken."""
    row = dict(ROWS[kind])
    whole: dict[str, Any] = {"bench": kind, "device": "CPU", "versions": {}, "rows": [row]}
    file = tmp_path / "report.json"
    report.write(file, whole)
    assert report.read(file) == whole
    del (whole if fault in whole else row)[fault]
    report.write(file, whole)
    with pytest.raises(Mxfp4Error, match=f"must be a report of `bench`; got {got}\\. "):
        report.read(file)


@pytest.mark.parametrize(
    ("gpu", "hip", "peers"),
    [(True, None, ("TRITON", "MARLIN")), (True, "7.0", ("TRITON",)), (False, None, ())],
    ids=["CUDA", "HIP", "CPU"],
)
def test_peers_are_those_of_the_platform(
    gpu: bool, hip: str | None, peers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None is asked for by default where it cannot run; by name it still is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.version, "hip", hip)
    parser = argparse.ArgumentParser()
    options.of_bench(parser)
    assert bench.peers_here() == peers
    assert parser.parse_args(["layer", "--peers", "marlin"]).peers == ["MARLIN"]


def test_ours_has_the_users_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory of the environment goes to the backend, as when it serves."""
    given: list[Path | None] = []
    prepare = reference.prepare

    def noted(weights: MoeWeights, shape: MoeShape, tables: Path | None = None) -> Any:
        given.append(tables)
        return prepare(weights, shape, tables)

    monkeypatch.setattr(reference, "prepare", noted)
    layer.ours(random_weights(SHAPE, 0), SHAPE)
    monkeypatch.setenv(TABLES_VAR, str(tmp_path))
    layer.ours(random_weights(SHAPE, 0), SHAPE)
    assert given == [None, tmp_path]


def test_the_first_copy_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a server checks one layer of a model, and not the others."""
    choose_from(monkeypatch, backend("some"))
    served = serving.ModelLayers(SHAPE, "gfx950", Settings(time_at_load=False), 64)
    monkeypatch.setattr(layer, "as_served", lambda *_: served)
    checked: list[Any] = []
    check = self_check.check
    monkeypatch.setattr(self_check, "check", lambda *given: (checked.append(given), check(*given))[1])
    for seed in range(3):
        layer.ours(random_weights(SHAPE, seed), SHAPE)
    assert len(checked) == 1


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("layer --tokens 0", "--tokens must be at least 1; got 0."),
        ("layer --captured -1", "--captured must be at least 0; got -1."),
        ("layer --plot x.jpg", "--plot must be a name that ends in .png or .svg; got x.jpg."),
        ("layer --plot no/x.png", "--plot must be a file in a directory that exists; got no/x.png."),
        ("serve --json no/x.json", "--json must be a file in a directory that exists; got no/x.json."),
        ("layer --json /", "--json must be a file in a directory that exists; got /."),
        ("plot no.json --plot x.png", "no.json must be a report of `bench`; got "),
        ("serve --load 1/2", "--load must be short, 1k1k, 1k8k, 8k1k or BATCH/INPUT/OUTPUT; got 1/2."),
        ("serve --load 1/0/2", "--load must be short, "),
        ("serve --load 1k1k --concurrency 4 0", "--concurrency must be at least 1; got 0."),
        ("serve --model x --routing alike", "--routing must be left out with a checkpoint; got alike."),
        ("serve --rounds 1", "--rounds must be at least 2, to show how far they differ; got 1."),
        (
            "serve --engine-args='",
            '--engine-args must be quoted as for a shell; got "\'". No closing quotation',
        ),
    ],
)
def test_wrong_arguments(arguments: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line, before anything is measured."""
    assert cli.main(["bench", *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith(f"vllm-mxfp4 bench: {error}")


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is measured, with what to do."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["bench", "layer", "--plot", "x.png"]) == 2
    assert "matplotlib must be installed for --plot; got nothing. pip install" in capsys.readouterr().err


@pytest.mark.engine
@pytest.mark.parametrize("model", serve.LAYERS)
def test_config_is_taken_for_gpt_oss(model: str, tmp_path: Path) -> None:
    """By vLLM, and our flag with it; its layer is the one that `bench layer` measures."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(serve.config(model)))
    assert engine.quantization_class(tmp_path, FLAG) == "vllm_mxfp4_gfx950.vllm_plugin.Mxfp4TritonConfig"
    assert layer_shape(str(file)) == layer_shape(model)


RESULT = {
    "completed": 8, "duration": 2.0, "total_input_tokens": 800, "total_output_tokens": 32,
    "median_ttft_ms": 5.0, "median_tpot_ms": 3.0,
}  # fmt: skip
"""Of vLLM's client: 8 requests of 100 and 4 tokens."""


def test_figures() -> None:
    """Output tokens a second, and the client's two medians; of prompts alone, input tokens a second."""
    assert serve.figures(RESULT, (2, 100, 4), 8) == {
        "tokens_per_s": 16.0, "first_token_ms": 5.0, "next_token_ms": 3.0,
    }  # fmt: skip
    assert serve.figures(RESULT | {"total_output_tokens": 8}, (2, 100, 1), 8) == {
        "tokens_per_s": 400.0, "first_token_ms": 5.0, "next_token_ms": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"completed": 7}, "the answers must be 8 with 4 tokens each; got 7 with 32 tokens in all"),
        (
            {"total_output_tokens": 31},
            "the answers must be 8 with 4 tokens each; got 8 with 31 tokens in all",
        ),
        ({"total_input_tokens": 808}, "the prompts must be 100 tokens on average; got 101"),
        ({"total_input_tokens": 792}, "the prompts must be 100 tokens on average; got 99"),
    ],
    ids=str,
)
def test_figures_of_another_load(change: dict[str, int], error: str) -> None:
    """Negative control: what the client measured is not what was asked for."""
    with pytest.raises(Mxfp4Error, match=error):
        serve.figures(RESULT | change, (2, 100, 4), 8)


def test_requests() -> None:
    """Waves of the concurrency, fewer of long answers, and enough for a median."""
    loads = [*serve.SHORT[2:], (1, 1024, 1024), (32, 1024, 1024), (16, 1024, 8192)]
    assert [serve.requests(load) for load in loads] == [1024, 4096, 256, 4, 64, 32]


def test_turns() -> None:
    """Each second round goes backwards; a routing is left once."""
    load, other = (1, 2, 3), (4, 5, 6)
    together = list(serve.turns(["a", "b", "c"], ["alike", "spread"], [load, other], 3, together=True))
    orders = ["abc", "cba", "abc"]
    assert together == [
        (engine, routing, each, number)
        for routing in ("alike", "spread")
        for each in (load, other)
        for number, engines in enumerate(orders)
        for engine in engines
    ]
    one_by_one = list(serve.turns(["a", "b", "c"], ["spread"], [load, other], 3, together=False))
    assert set(one_by_one) == {turn for turn in together if turn[1] == "spread"}
    assert [turn[0] for turn in one_by_one[::2]] == list("".join(orders))
    assert [turn[2] for turn in one_by_one] == [load, other] * 9


def rows_of(**rounds: list[float]) -> list[dict[str, Any]]:
    """Rows of engines under one load, whose answers have one token."""
    load = {"routing": "spread", "batch": 1, "input": 2, "output": 1}
    return [
        load | {"engine": name, "tokens_per_s": some, "first_token_ms": some, "next_token_ms": []}
        for name, some in rounds.items()
    ]


@pytest.mark.parametrize(
    ("ours", "end"),
    [
        ([110.0, 115.0, 104.0], "1.100, within the spread"),
        ([104.0, 110.0, 115.0], "1.100, within the spread"),
        ([106.0, 110.0, 115.0], "1.100"),
        ([90.0, 94.0, 95.0], "0.940"),
        ([96.0, 96.0, 80.0], "0.960, within the spread"),
        ([110.0], ""),
    ],
    ids=str,
)
def test_comparison_says_what_is_no_finding(ours: list[float], end: str) -> None:
    """Where rounds of ours and of the best other one meet, and only there. One round compares nothing."""
    rows = rows_of(ours=ours, SLOW=[50.0, 110.0], BEST=[105.0, 95.5, 100.0])
    title, rate, first = bench.comparison(rows, ["ours", "BEST", "SLOW", "NONE"])
    assert title.split() == [
        "routing",
        "batch",
        "in/out",
        "ours",
        "BEST",
        "SLOW",
        "NONE",
        "ours/best",
        "peer",
    ]
    assert "100.0 ± 4.8%" in rate
    assert "80.000 ±37.5%              none" in rate
    if len(ours) > 1:
        assert rate.endswith(f"none  {end}")
        # Of a time the least is the best.
        assert float(first.split("none")[1].split()[0].strip(",")) == round(statistics.median(ours) / 80, 3)
    else:
        assert rate.endswith("none")


class StandIn:
    """Servers of which so many fit into memory, and what was done with them."""

    def __init__(self, room: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        self.done: list[str] = []
        self.up: list[str] = []
        self.shares: list[str] = []
        self.warmed: list[str] = []
        self.called: list[str] = []
        stand_in = self

        class Server:
            def __init__(self, arguments: list[str], _environment: dict[str, str], log: Path) -> None:
                self.url = log.stem
                stand_in.done.append(f"start {self.url}")
                stand_in.up.append(self.url)
                stand_in.shares.append(arguments[arguments.index("--gpu-memory-utilization") + 1])

            def wait_until_healthy(self) -> None:
                if self.url == "NOPE" or len(stand_in.up) > room:
                    raise Mxfp4Error("the server", "able to start", "no memory", "Read the log")

            def stop(self) -> None:
                stand_in.done.append(f"stop {self.url}")
                stand_in.up.remove(self.url)

        def measure(
            _client: object, server: Server, _model: str, load: serve.Load, requests: int, seed: int
        ) -> dict[str, Any]:
            batch, inputs, outputs = load
            if seed:
                self.done.append(f"{server.url} {batch}/{inputs}/{outputs} {seed}")
            else:
                assert (requests, outputs) == (batch, min(outputs, serve.WARM_UP_TOKENS))
                self.warmed.append(f"{server.url} {batch}/{inputs}")
            return RESULT | {
                "completed": requests,
                "total_input_tokens": requests * inputs,
                "total_output_tokens": requests * outputs,
            }

        monkeypatch.setattr(serve, "ServerProcess", Server)

        def call(url: str, method: str, *_: str) -> dict[str, str]:
            self.called.append(f"{url} {method}")
            return {"path": "path", "device": "CPU"}

        monkeypatch.setattr(serve.vllm_client, "call", call)
        monkeypatch.setattr(serve.vllm_client.Client, "measure", measure)


TWO_LOADS = ["bench", "serve", "--model", "m", "--rounds", "2", "--load", "1/2/3", "4/5/6"]


def test_engines_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All servers at once: each load is measured with both before the next, there and back."""
    stand_in = StandIn(2, monkeypatch, tmp_path)
    file = tmp_path / "serve.json"
    assert cli.main([*TWO_LOADS, "--engines", "ours", "a", "--json", str(file)]) == 0
    assert stand_in.shares == ["0.450", "0.450"]
    assert stand_in.warmed == ["ours 1/2", "A 1/2", "ours 4/5", "A 4/5"]
    assert stand_in.called == ["ours path_for_bench", "A path_for_bench"]
    assert stand_in.done == [
        "start ours", "start A",
        "ours 1/2/3 1", "A 1/2/3 1", "A 1/2/3 2", "ours 1/2/3 2",
        "ours 4/5/6 1", "A 4/5/6 1", "A 4/5/6 2", "ours 4/5/6 2",
        "stop ours", "stop A",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [file]
    rows = report.read(file)["rows"]
    assert [(row["engine"], row["batch"], len(row["tokens_per_s"])) for row in rows] == [
        ("ours", 1, 2), ("A", 1, 2), ("ours", 4, 2), ("A", 4, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("room", [1, 2], ids=["no-room", "asked-for"])
def test_engines_go_back_and_forth(
    room: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One server at a time, the last one's twice in a row; what cannot start at all is left out."""
    stand_in = StandIn(room, monkeypatch, tmp_path)
    more = ["--one-by-one"] if room > 1 else []
    assert cli.main([*TWO_LOADS, "--engines", "ours", "nope", "a", *more]) == 1
    if not more:
        assert stand_in.shares[:2] == ["0.300", "0.300"]
        del stand_in.done[: stand_in.done.index("stop NOPE") + 1]
    assert set(stand_in.shares[-3:]) == {"0.900"}
    assert stand_in.done == [
        "start ours", "ours 1/2/3 1", "ours 4/5/6 1", "stop ours",
        "start NOPE", "stop NOPE",
        "start A", "A 1/2/3 1", "A 4/5/6 1", "A 1/2/3 2", "A 4/5/6 2", "stop A",
        "start ours", "ours 1/2/3 2", "ours 4/5/6 2", "stop ours",
    ]  # fmt: skip
    assert stand_in.warmed == [f"{name} {load}" for name in ("ours", "A", "ours") for load in ("1/2", "4/5")]
    assert len(list(tmp_path.glob("mxfp4-bench-*"))) == 1  # The logs of what failed.
    printed = capsys.readouterr().out
    assert ("not all at once: the server must be able to start; got no memory." in printed) == (room == 1)
    assert "\nNOPE     FAIL the server must be able to start; got no memory. " in printed


def test_weights_are_spread_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When all has been measured with those that vLLM makes, and before the next warm-up."""
    stand_in = StandIn(1, monkeypatch, tmp_path)
    command = ["bench", "serve", "--rounds", "2", "--load", "1/2/3", "--engines", "ours", "--routing"]
    assert cli.main([*command, *serve.ROUTINGS]) == 0
    assert stand_in.called == ["ours path_for_bench", "ours spread_for_bench"]
    assert stand_in.warmed == ["ours 1/2"] * 2
    assert stand_in.done == ["start ours", *(f"ours 1/2/3 {seed}" for seed in (1, 2, 1, 2)), "stop ours"]


def test_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was measured until then is printed and in the file, and no server is left."""
    stand_in = StandIn(2, monkeypatch, tmp_path)
    file = tmp_path / "serve.json"
    keep = bench.keep

    def cut(*arguments: Any) -> None:
        if stand_in.done[-1] == "A 1/2/3 2":
            os.kill(os.getpid(), signal.SIGTERM)
        keep(*arguments)

    monkeypatch.setattr(bench, "keep", cut)
    with pytest.raises(SystemExit) as ended:
        cli.main([*TWO_LOADS, "--engines", "ours", "a", "--json", str(file)])
    assert ended.value.code == 128 + signal.SIGTERM
    assert stand_in.up == []
    rows = report.read(file)["rows"]
    assert [(row["engine"], len(row["tokens_per_s"])) for row in rows] == [("ours", 1), ("A", 1)]
    assert capsys.readouterr().out.splitlines()[-4].split() == [
        "routing", "batch", "in/out", "ours", "A", "ours/best", "peer",
    ]  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("model", serve.LAYERS)
def test_tokenizer_keeps_lengths(model: str, tmp_path: Path) -> None:
    """Of the client's random prompts; negative control: one that takes words apart."""
    serve.write_dummy(model, tmp_path)
    assert engine.random_prompts(tmp_path, 100) == [100] * 4
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {"type": "Digits", "individual_digits": False}
    file.write_text(json.dumps(content))
    assert 100 not in engine.random_prompts(tmp_path, 100)


def test_worker_that_is_not_there() -> None:
    """Nobody listens."""
    with pytest.raises(
        Mxfp4Error, match="path_for_bench of the server must be answered; got ConnectionError"
    ):
        vllm_client.call(f"http://127.0.0.1:{free_port()}", "path_for_bench", "ours")


@pytest.mark.load
def test_client_says_why(tmp_path: Path) -> None:
    """vLLM's client finds no tokenizer; and a server ends while it is measured."""
    log = tmp_path / "server.log"
    log.write_text("ValueError: out of something\n")
    client = vllm_client.Client(tmp_path)
    main = SimpleNamespace(poll=lambda: None, returncode=3)
    server: Any = SimpleNamespace(url="http://127.0.0.1:1", main=main, log=log)
    with pytest.raises(Mxfp4Error, match=r"vLLM's client must be able to measure; got .*nowhere"):
        client.measure(server, str(tmp_path / "nowhere"), (1, 8, 8), 1, seed=0)
    main.poll = lambda: 3
    rule = r"the server must be running until it is measured; got exit code 3 after: .*out of something"
    with pytest.raises(Mxfp4Error, match=rule):
        client.measure(server, str(tmp_path), (1, 8, 8), 1, seed=0)


@pytest.mark.load
@pytest.mark.engine
def test_bench_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two servers of dummy weights at once, through vLLM's client, until what this CPU cannot do.

    No backend of vLLM for MXFP4 runs on every CPU, so the second server is one of ours, too.
    """
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    again = "AGAIN"
    arguments, call = serve.arguments, vllm_client.call
    monkeypatch.setattr(
        serve, "arguments", lambda m, d, name, *rest: arguments(m, d, name.replace(again, "ours"), *rest)
    )
    monkeypatch.setattr(
        vllm_client, "call", lambda url, method, *names: call(url, method, *("ours" for _ in names))
    )
    monkeypatch.setitem(serve.LAYERS, "tiny", 2)
    sizes = serve.GPT_OSS["gpt-oss-20b"] | {
        "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
    }  # fmt: skip
    monkeypatch.setitem(serve.GPT_OSS, "tiny", sizes)
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, engine.ENVIRONMENT[name])
    file = tmp_path / "serve.json"
    command = ["bench", "serve", "--model", "tiny", "--json", str(file), "--rounds", "2"]
    command += ["--routing", *serve.ROUTINGS, "--load", "2/8/40", "3/16/1", "--engines", "ours", again]
    assert cli.main([*command, f"--engine-args={SERVED} --dtype float32"]) == 1
    printed = capsys.readouterr().out
    done = report.read(file)
    assert list(done["failed"]) == ["ours", again]
    assert "got none of router" in done["failed"][again]
    assert "not all at once" not in printed
    assert f"{again:8} through Mxfp4TritonMoEMethod reference, " in printed
    assert [(row["engine"], row["batch"]) for row in done["rows"]] == [
        ("ours", 2), (again, 2), ("ours", 3), (again, 3),
    ]  # fmt: skip
    for row in done["rows"]:
        rates, first, following = row["tokens_per_s"], row["first_token_ms"], row["next_token_ms"]
        assert (row["routing"], len(rates), len(first)) == ("alike", 2, 2)
        if row["output"] == 1:
            assert following == []
            continue
        for rate, begin, one in zip(rates, first, following, strict=True):
            # The rate, put together from the two latencies again; requests of a wave do not begin as one.
            milliseconds = begin + (row["output"] - 1) * one
            assert rate == pytest.approx(1e3 * row["batch"] * row["output"] / milliseconds, rel=0.3)


def test_routings() -> None:
    """In the order in which they can be measured, each once; a checkpoint has its own."""
    asked = ["spread", "alike", "spread"]
    assert serve.routings("gpt-oss-20b", asked) == ["alike", "spread"]
    assert serve.routings("gpt-oss-120b", None) == ["spread"]
    assert serve.routings("openai/gpt-oss-20b", None) == ["checkpoint"]


@pytest.mark.parametrize("seed", range(5))
def test_spread(seed: int) -> None:
    """Tokens of dummy weights choose the same experts, and other ones each once they are spread."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model = torch.nn.ModuleDict(
            {
                "embedding": torch.nn.Embedding(64, 256),
                "norm": torch.nn.RMSNorm(256),
                "router": torch.nn.Linear(256, 32),
            }
        )

        def chosen() -> int:
            logits = model["router"](model["norm"](model["embedding"](torch.arange(64))))
            return len(reference.route(logits, 4)[0].sort().values.unique(dim=0))

        for parameter in model.parameters():
            parameter.uniform_(-1e-3, 1e-3, generator=generator)  # vLLM's dummy weights.
        model["router"].bias.copy_(torch.arange(32) * 1e-4)
        assert chosen() == 1
        vllm_worker.spread(model)
        assert chosen() > 32


def test_spread_refuses_other_names() -> None:
    """Negative control: a model whose router it would not find."""
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(4, 4), "norm": torch.nn.RMSNorm(4)})
    with pytest.raises(Mxfp4Error, match=r"got none of router\. "):
        vllm_worker.spread(model)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("cpu", "dtype", "packed"),
    [("this-cpu", "float32", True), ("avx2", "float32", True), ("avx2", "bfloat16", False)],
)
def test_spread_refuses_a_packed_router(cpu: str, dtype: str, packed: bool, checkpoint: Path) -> None:
    """Dummy weights are measured as they are, and where vLLM packs them that is all.

    It packs them where oneDNN multiplies their type: fp32 on every x86-64, bf16 not with AVX2 alone.
    """
    calls = [("path_for_bench", "ours"), ("spread_for_bench",)]
    path, spread = engine.worker_answers(
        checkpoint, calls, cpu, quantization=FLAG, load_format="dummy", dtype=dtype
    )
    assert path["done"] == {"path": "Mxfp4TritonMoEMethod reference", "device": "CPU"}
    if packed:
        assert "none of router" in spread["refused"]
    else:
        assert spread == {"done": None}


@pytest.mark.engine
def test_bench_serve_refuses_another_path(checkpoint: Path, tmp_path: Path) -> None:
    """Negative control: the flag is lost, vLLM serves the model all the same, and nothing is measured."""
    content = json.loads((checkpoint / "config.json").read_text())
    del content["quantization_config"]  # vLLM's own MXFP4 does not run on every CPU.
    (tmp_path / "config.json").write_text(json.dumps(content))
    (answer,) = engine.worker_answers(
        tmp_path, [("path_for_bench", "ours")], load_format="dummy", skip_tokenizer_init=True
    )
    name, rule, value, _ = answer["refused"]
    assert (name, rule) == ("the path of ours's MoE layers", "Mxfp4TritonMoEMethod")
    assert value.startswith("UnquantizedFusedMoEMethod")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and vLLM's kernels for it")
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", vllm_layers.BUILDERS)
def test_peer(name: str, ranks: int) -> None:
    """vLLM's own layers are prepared and called so that they are right, and are captured in a graph.

    A share of four ranks has to be padded.
    """
    shape, device = layer_shape("gpt-oss-20b", ranks), torch.device("cuda")
    row, *_ = layer.measure(shape, [37], {name: vllm_layers.BUILDERS[name]}, REACHED, device)
    assert not row.failed
    assert list(row.us) == list(row.host_us) == [name]
