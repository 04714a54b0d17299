"""Servers of vLLM, each with another MoE backend, measured in turn by vLLM's own client."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from vllm_mxfp4_gfx950.bench import vllm_client
from vllm_mxfp4_gfx950.errors import Mxfp4Error
from vllm_mxfp4_gfx950.models import CONFIG, GPT_OSS
from vllm_mxfp4_gfx950.process import ServerProcess

if TYPE_CHECKING:
    from typing_extensions import Self

LAYERS = {"gpt-oss-20b": 24, "gpt-oss-120b": 36}

Load: TypeAlias = tuple[int, int, int]
"""Requests at a time, and of each of them input and output tokens."""

Turn: TypeAlias = tuple[str, str, Load, int]
"""An engine's: its name, the routing, the load and the round."""

SHORT: list[Load] = [(1, 128, 128), (16, 128, 128), (64, 128, 128), (256, 128, 64), (16, 2048, 1)]
LENGTHS = {"1k1k": (1024, 1024), "1k8k": (1024, 8192), "8k1k": (8192, 1024)}
"""InferenceMax's."""

ROUTINGS = ("alike", "spread")
"""Of dummy weights, in the order in which an engine can be measured with them: all tokens have the same
experts, as vLLM makes such weights; or each has its own, once `vllm_worker.spread` changed them."""

WORKER = "vllm_mxfp4_gfx950.bench.vllm_worker.Worker"
ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_API_KEY": ""}
"""A server answers what its worker is asked, and demands no key."""

MEMORY = 0.9
"""Of a GPU, for all servers that run at once."""

MARGIN = 64
"""Tokens that a request may have beyond its load's, as not every tokenizer keeps a text's length."""

TOKENS_AT_A_TIME = 2048
"""That each of the requests at a time should make, so that a load takes long enough to be measured."""

WAVES = (2, 16)
"""Times the concurrency: the fewest and the most requests of a load."""

LEAST_REQUESTS = 4
WARM_UP_TOKENS = 64
"""That a request of the warm-up makes at most."""


def loads(name: str, concurrency: list[int]) -> list[Load]:
    """What a name stands for.

    Args:
        name: "short", one of LENGTHS, or BATCH/INPUT/OUTPUT.
        concurrency: the batches of LENGTHS.

    Raises:
        Mxfp4Error: it is something else.
    """
    if name == "short":
        return SHORT
    if name in LENGTHS:
        return [(batch, *LENGTHS[name]) for batch in concurrency]
    parts = name.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        rule = f"short, {', '.join(LENGTHS)} or BATCH/INPUT/OUTPUT"
        raise Mxfp4Error("--load", rule, name, "Correct it, as in 16/128/64")
    batch, inputs, outputs = map(int, parts)
    return [(batch, inputs, outputs)]


def requests(load: Load) -> int:
    """How many a load has: enough waves of them to be timed, of long answers fewer."""
    batch, _, outputs = load
    fewest, most = WAVES
    return max(LEAST_REQUESTS, batch * min(most, max(fewest, TOKENS_AT_A_TIME // outputs)))


def routings(model: str, asked: list[str] | None) -> list[str]:
    """With which experts a model is measured.

    Args:
        model: as in `arguments`.
        asked: of ROUTINGS; None for the default.

    Raises:
        Mxfp4Error: the model is a checkpoint, whose tokens choose what they choose.
    """
    if model in LAYERS:
        return [routing for routing in ROUTINGS if routing in (asked or ["spread"])]
    if asked:
        fix = f"Leave it out, or measure {' or '.join(LAYERS)}"
        raise Mxfp4Error("--routing", "left out with a checkpoint", " ".join(asked), fix)
    return ["checkpoint"]


def config(model: str) -> dict[str, Any]:
    """A model's config.json, as far as vLLM reads it.

    Source: as of `models.CONFIG`.
    """
    sizes = {name: value for name, value in GPT_OSS[model].items() if name != "swiglu_alpha"}
    return {
        **CONFIG,
        **sizes,
        "eos_token_id": 200002,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS[model] // 2),
        "num_attention_heads": 64,
        "num_hidden_layers": LAYERS[model],
        "num_key_value_heads": 8,
        "pad_token_id": 199999,
        "quantization_config": {"quant_method": "mxfp4"},
        "sliding_window": 128,
        # Without it transformers suspects a large tokenizer of being one of Mistral's that needs a repair.
        "transformers_version": "4.55.0.dev0",
        "vocab_size": 201088,
    }


def write_dummy(model: str, directory: Path) -> None:
    """Write all that vLLM and its client read of a model without weights: its config and a tokenizer.

    Each token is a word of its own, so that any tokens, written as text, are the same tokens again. One is
    longer than the others: vLLM refuses a text that is longer than so many of the longest, without spaces.

    Args:
        model: a name in LAYERS.
        directory: which exists.
    """
    content = config(model)
    words = [f"t{i}" for i in range(content["vocab_size"])]
    words[content["pad_token_id"]] = "<padding>"
    tokenizer = {
        "version": "1.0",
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(words)},
            "unk_token": words[0],
        },
        "added_tokens": [],
    }
    names = {"eos_token": words[content["eos_token_id"]], "pad_token": words[content["pad_token_id"]]}
    written = {
        "config.json": content,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"} | names,
    }
    for name, each in written.items():
        (directory / name).write_text(json.dumps(each))


def arguments(
    model: Path | str, dummy: bool, engine: str, measured: list[Load], extra: list[str]
) -> list[str]:
    """Of `vllm serve`.

    Args:
        model: a directory, or what vLLM takes for a model.
        dummy: whether its weights are.
        engine: "ours", or a name of vLLM's `--moe-backend` in capitals.
        measured: the loads.
        extra: more, which come last and so have the last word.
    """
    largest = max(batch for batch, _, _ in measured)
    batches = {2**i for i in range(largest.bit_length())} | {batch for batch, _, _ in measured}
    length = max(inputs + outputs for _, inputs, outputs in measured) + MARGIN
    graphs = {"cudagraph_capture_sizes": sorted(batches)}
    return [
        *("serve", str(model), "--load-format", "dummy" if dummy else "auto"),
        *("--max-model-len", str(length), "--no-enable-prefix-caching"),
        *("--compilation-config", json.dumps(graphs), "--worker-extension-cls", WORKER),
        *(("--quantization", "mxfp4-triton") if engine == "ours" else ("--moe-backend", engine.lower())),
        *extra,
    ]


def turns(
    engines: list[str], routings: list[str], loads: list[Load], rounds: int, together: bool
) -> Iterator[Turn]:
    """Who is measured when. Each second round goes backwards, so that none is always the first.

    Args:
        engines: their names.
        routings: in an order in which one engine can have them.
        loads: what each is measured under.
        rounds: how often.
        together: whether all engines run, and take turns under each load; else each has all loads in turn.
    """
    for routing in routings:
        if together:
            for load in loads:
                for number in range(rounds):
                    for engine in engines[:: -1 if number % 2 else 1]:
                        yield engine, routing, load, number
        else:
            for number in range(rounds):
                for engine in engines[:: -1 if number % 2 else 1]:
                    for load in loads:
                        yield engine, routing, load, number


@dataclass
class Running:
    """A server that answers.

    Args:
        process: its own.
        start_s: seconds that it took to start.
        facts: "path" and "device" of its worker, once it was asked.
        routing: of its weights.
        warm: the loads that it has seen, with their routing.
    """

    process: ServerProcess
    start_s: float
    facts: dict[str, str] = field(default_factory=dict)
    routing: str = ROUTINGS[0]
    warm: set[tuple[str, Load]] = field(default_factory=set)


class Servers:
    """Those of all engines, or of one after another; what runs is stopped where a `with` of it ends.

    Args:
        model: a name in LAYERS, which is served with dummy weights; or what vLLM takes for a model.
        measured: the loads.
        extra: arguments of `vllm serve`, the user's own.
        directory: gets a dummy model's files, the logs, and what the client writes.
    """

    def __init__(self, model: str, measured: list[Load], extra: list[str], directory: Path) -> None:
        self.dummy, self.measured, self.extra, self.directory = model in LAYERS, measured, extra, directory
        self.model: Path | str = model
        if self.dummy:
            self.model = directory / model
            self.model.mkdir()
            write_dummy(model, self.model)
        self.running: dict[str, Running] = {}
        self.client = vllm_client.Client(directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, engine: str, share: float) -> None:
        """Start an engine's server, and wait until it answers.

        Args:
            engine: as in `arguments`.
            share: of MEMORY that it may take.

        Raises:
            Mxfp4Error: it does not start.
        """
        began = time.monotonic()
        extra = ["--gpu-memory-utilization", f"{MEMORY * share:.3f}", *self.extra]
        command = arguments(self.model, self.dummy, engine, self.measured, extra)
        log = self.directory / f"{engine}.log"
        print(f"starting {engine}: {log}", flush=True)
        process = ServerProcess(command, os.environ | ENVIRONMENT, log)
        self.running[engine] = Running(process, 0)
        process.wait_until_healthy()
        self.running[engine].start_s = time.monotonic() - began

    def start_all(self, engines: list[str]) -> None:
        """Start each beside the others, one after another, as each measures memory, and ours the kernels."""
        for engine in engines:
            self.start(engine, 1 / len(engines))

    def stop(self, *engines: str) -> None:
        """Stop these servers; without a name, all."""
        for engine in engines or tuple(self.running):
            running = self.running.pop(engine, None)
            if running:
                running.process.stop()

    def measure(self, turn: Turn) -> dict[str, Any]:
        """One round's figures, after a warm-up where it is this server's first under this load.

        Args:
            turn: of an engine whose server runs, or for which the one that runs is stopped.

        Returns:
            what is known of the engine: path, device, start_s; and tokens_per_s, first_token_ms and
            next_token_ms, None where only one token is asked for.

        Raises:
            Mxfp4Error: its server does not start or stops, its MoE layers do not take the path that is to be
                measured, or not every request was answered whole.
        """
        engine, routing, load, number = turn
        if engine not in self.running:
            self.stop()
            self.start(engine, 1)
        running = self.running[engine]
        process = running.process
        if not running.facts:
            running.facts = vllm_client.call(process.url, "path_for_bench", engine)
        if routing == "spread" and running.routing != routing:
            vllm_client.call(process.url, "spread_for_bench")
            running.routing = routing
        batch, inputs, outputs = load
        if (routing, load) not in running.warm:
            brief = batch, inputs, min(outputs, WARM_UP_TOKENS)
            self.client.measure(process, str(self.model), brief, batch, seed=0)
            running.warm.add((routing, load))
        found = self.client.measure(process, str(self.model), load, requests(load), seed=number + 1)
        return running.facts | {"start_s": running.start_s} | figures(found, load, requests(load))


def figures(found: dict[str, Any], load: Load, asked: int) -> dict[str, Any]:
    """What is kept of a result of vLLM's client.

    Args:
        found: the result.
        load: what was measured.
        asked: how many requests there were.

    Raises:
        Mxfp4Error: a request was not answered, or with another number of tokens; or a hundredth of the
            prompts' tokens is missing or too many.
    """
    _, inputs, outputs = load
    done = found["completed"], found["total_output_tokens"]
    if done != (asked, asked * outputs):
        rule = f"{asked} with {outputs} tokens each"
        value = f"{done[0]} with {done[1]} tokens in all"
        raise Mxfp4Error("the answers", rule, value, "Read the server's log")
    if abs(found["total_input_tokens"] / (asked * inputs) - 1) >= 0.01:
        value = f"{found['total_input_tokens'] / asked:g}"
        raise Mxfp4Error(
            "the prompts",
            f"{inputs} tokens on average",
            value,
            "Measure longer prompts, or another checkpoint",
        )
    tokens = "total_output_tokens" if outputs > 1 else "total_input_tokens"
    return {
        "tokens_per_s": found[tokens] / found["duration"],
        "first_token_ms": found["median_ttft_ms"],
        "next_token_ms": found["median_tpot_ms"] if outputs > 1 else None,
    }
