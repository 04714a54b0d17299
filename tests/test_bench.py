"""`vllm-mxfp4 bench`: what is timed is right, what is counted is there, what ran is what was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import engine
import pytest
import tiny_checkpoint
import torch
from engine import FLAG
from tiny_checkpoint import TinyGptOss

from vllm_mxfp4_gfx950 import cli, options, timing
from vllm_mxfp4_gfx950.backends import reference
from vllm_mxfp4_gfx950.bench import layer, report, serve, vllm_layers
from vllm_mxfp4_gfx950.bench.layer import Layer
from vllm_mxfp4_gfx950.commands import bench
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import layer_shape
from vllm_mxfp4_gfx950.moe import MoeShape, MoeWeights
from vllm_mxfp4_gfx950.random_layer import make_shape, random_tokens, random_weights
from vllm_mxfp4_gfx950.settings import TABLES_VAR

CPU = torch.device("cpu")
SHAPE = make_shape(4, 2, 64, 32)
REACHED = layer.Speeds(copy=1e9, multiply=1e12)
SERVED = {"enforce_eager": True, "kv_cache_memory_bytes": 2**26}
DUMMY = SERVED | {"load_format": "dummy"}
LOADS = [(1, 8, 4)]
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
    assert five.failed["stops"] == "OutOfMemoryError: out of memory ... and more"
    assert one.layer == str(SHAPE)
    assert one.weight_bytes == 2 * layer.expert_bytes(SHAPE)
    assert one.floor_us == 1e6 * one.weight_bytes / 1e9


def test_layers_take_turns() -> None:
    """No call meets the layer of the call before it, from replay to replay as well."""
    met: list[int] = []

    def numbered(number: int) -> Layer:
        return lambda x, _logits: (met.append(number), x)[1]

    some = [numbered(number) for number in range(layer.copies(SHAPE, CPU))]
    batches = [random_tokens(SHAPE, 1, seed) for seed in range(layer.CALLS)]
    calls = layer.in_turn(some, batches, CPU)
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
    monkeypatch.setattr(layer, "ours", fault)
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


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("layer --tokens 0", "--tokens must be at least 1; got 0."),
        ("layer --plot x.jpg", "--plot must be a name that ends in .png or .svg; got x.jpg."),
        ("layer --plot no/x.png", "--plot must be a file in a directory that exists; got no/x.png."),
        ("serve --json no/x.json", "--json must be a file in a directory that exists; got no/x.json."),
        ("layer --json /", "--json must be a file in a directory that exists; got /."),
        ("plot no.json --plot x.png", "no.json must be a report of `bench`; got "),
        ("serve --load 1/2", "--load must be short, 1k1k, 1k8k, 8k1k or BATCH/INPUT/OUTPUT; got 1/2."),
        ("serve --load 1/0/2", "--load must be short, "),
        ("serve --load 1k1k --concurrency 4 0", "--concurrency must be at least 1; got 0."),
        ("serve --model x --routing alike", "--routing must be left out with a checkpoint; got alike."),
        ("serve --rounds 0", "--rounds must be at least 1; got 0."),
        ("serve --engine-args [1]", "--engine-args must be a JSON object; got [1]."),
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


@pytest.mark.load
@pytest.mark.engine
def test_bench_serve(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two loads through a real engine, after one that could not start."""
    file = tmp_path / "serve.json"
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.setenv(name, engine.ENVIRONMENT[name])
    command = ["bench", "serve", "--model", str(checkpoint), "--json", str(file), "--rounds", "2"]
    command += ["--load", "2/8/4", "3/16/1", "--engines", "nope", "ours", "--engine-args", json.dumps(SERVED)]
    assert cli.main(command) == 1
    failed, through, *lines = capsys.readouterr().out.splitlines()
    assert failed.startswith("NOPE     FAIL ")
    assert through == "ours     through Mxfp4TritonMoEMethod reference"
    assert len(lines) == 5
    done = report.read(file)
    assert list(done["failed"]) == ["NOPE"]
    first, second = (statistics.median(row["tokens_per_s"]) for row in done["rows"])
    assert lines[-2:] == [
        f"checkpoint     2 8/4               FAIL{first:10.1f}",
        f"checkpoint     3 16/1              FAIL{second:10.1f}",
    ]
    for row, (batch, inputs, outputs) in zip(done["rows"], ((2, 8, 4), (3, 16, 1)), strict=True):
        assert (row["batch"], row["input"], row["output"]) == (batch, inputs, outputs)
        assert row["path"] == "Mxfp4TritonMoEMethod reference"
        for rate, first, following in zip(
            row["tokens_per_s"], row["first_token_ms"], row["next_token_ms"] or (0, 0), strict=True
        ):
            # The rate, put together from the two latencies again.
            milliseconds = first + (outputs - 1) * following
            assert rate == pytest.approx(1e3 * batch * (outputs if outputs > 1 else inputs) / milliseconds)


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
        serve.spread(model)
        assert chosen() > 32


def test_spread_refuses_other_names() -> None:
    """Negative control: a model whose router it would not find."""
    model = torch.nn.ModuleDict({"embedding": torch.nn.Embedding(4, 4), "norm": torch.nn.RMSNorm(4)})
    with pytest.raises(Mxfp4Error, match=r"got none of router\. "):
        serve.spread(model)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("cpu", "dtype", "packed"),
    [("this-cpu", "float32", True), ("avx2", "float32", True), ("avx2", "bfloat16", False)],
)
def test_spread_refuses_a_packed_router(
    cpu: str, dtype: str, packed: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """An engine is measured with its dummy weights as they are, and where vLLM packs them that is all.

    It packs them where oneDNN multiplies their type: fp32 on every x86-64, bf16 not with AVX2 alone.
    """
    job = {
        "engine": "ours",
        "arguments": serve.arguments(str(checkpoint), "ours", LOADS, tmp_path, DUMMY | {"dtype": dtype}),
        "routings": list(serve.ROUTINGS),
        "loads": LOADS,
        "rounds": 1,
    }
    # The first engine of a process logs to what is the standard output then.
    lines = [line for line in engine.bench(job, cpu).splitlines() if line.startswith(("ROW ", "FAILED "))]
    alike, spread = lines
    assert json.loads(alike.removeprefix("ROW "))["routing"] == "alike"
    if packed:
        assert "FAILED" in spread
        assert "got none of router." in spread
    else:
        assert json.loads(spread.removeprefix("ROW "))["routing"] == "spread"


@pytest.mark.engine
def test_bench_serve_refuses_another_path(checkpoint: Path, tmp_path: Path) -> None:
    """Negative control: the flag is lost, vLLM serves the model all the same, and nothing is reported."""
    content = json.loads((checkpoint / "config.json").read_text())
    del content["quantization_config"]  # vLLM's own MXFP4 does not run on every CPU.
    (tmp_path / "config.json").write_text(json.dumps(content))
    arguments = serve.arguments(str(tmp_path), "ours", LOADS, tmp_path, DUMMY | {"quantization": None})
    printed = engine.bench(
        {"engine": "ours", "arguments": arguments, "routings": ["checkpoint"], "loads": LOADS, "rounds": 1}
    )
    assert re.fullmatch(
        r"FAILED \"Mxfp4Error: the path of ours's MoE layers must be Mxfp4TritonMoEMethod; "
        r"got UnquantizedFusedMoEMethod\b.*\"\n",
        printed,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and vLLM's kernels for it")
@pytest.mark.parametrize("name", vllm_layers.BUILDERS)
def test_peer(name: str) -> None:
    """vLLM's own layers are prepared and called so that they are right, and are captured in a graph."""
    shape, device = layer_shape("gpt-oss-20b"), torch.device("cuda")
    row, *_ = layer.measure(shape, [37], {name: vllm_layers.BUILDERS[name]}, REACHED, device)
    assert not row.failed
    assert list(row.us) == [name]
