"""vLLM's engine in one process of its own, where nothing that it sets reaches the other tests."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from vllm import LLM

for folder in ("demo", "accuracy"):  # For tiny_checkpoint and questions, which the tests share.
    sys.path.append(str(Path(__file__).parents[2] / folder))

P = ParamSpec("P")
R = TypeVar("R")

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_DISABLE_COMPILE_CACHE": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # For a GPU without flashinfer: what is asked here is greedy.
    # One thread, bound to no core: several wait for each other for seconds where other work runs beside them.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Lets a function be sent to the ranks: the one that lists their MoE methods.
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # An operator whose result is its argument is an error, as it is for torch only where CI is set.
    "TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "1",
}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
CPUS: dict[str, dict[str, str]] = {"this-cpu": {}, "avx2": AVX2}
"""Kinds of CPU that an engine can be started for, and what makes torch and oneDNN take this one for it."""

FLAG = "mxfp4-triton"
OUR_METHOD = "vllm_mxfp4_gfx950.vllm_plugin.Mxfp4TritonMoEMethod"
TOP = 20
"""vLLM reports at most this many alternatives for a token."""


@dataclass(frozen=True)
class Turn:
    """What is done with an engine before it answers once more.

    Args:
        calls: methods of vllm.LLM and their arguments.
        adapter: a LoRA for all prompts; None for the model alone.
    """

    calls: tuple[tuple[str, dict[str, Any]], ...] = ()
    adapter: Path | None = None


@dataclass(frozen=True)
class Served:
    """What an engine answered.

    Args:
        moe_methods: the classes that computed its MoE layers.
        token_ids: of each answer.
        logprobs: of each answer, for each token: the likeliest alternatives by token.
        accepted: draft tokens so far that the model would have chosen itself; 0 without a log of statistics.
    """

    moe_methods: set[str]
    token_ids: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    accepted: int = 0


def serve(
    checkpoint: Path, prompts: list[list[int]], tokens: int, cpu: str = "this-cpu", **arguments: Any
) -> Served:
    """Answer prompts greedily.

    Args:
        checkpoint: a directory.
        prompts: their token ids.
        tokens: how many to generate for each.
        cpu: one of CPUS.
        arguments: of vllm.LLM.
    """
    return _in_engine_process(cpu, serve_here, checkpoint, prompts, tokens, arguments)


def serve_in_turn(
    checkpoint: Path, prompts: list[list[int]], tokens: int, turns: list[Turn], **arguments: Any
) -> list[Served]:
    """`serve` by one engine several times, each after a turn."""
    return _in_engine_process("this-cpu", _serve_in_turn, checkpoint, prompts, tokens, turns, arguments)


def serve_on_ranks(
    checkpoint: Path, prompts: list[list[list[int]]], tokens: int, **arguments: Any
) -> list[Served]:
    """`serve` by data-parallel ranks.

    Args:
        checkpoint: a directory.
        prompts: each rank's own. One that has answered its own waits for the others.
        tokens: as in `serve`.
        arguments: of vllm.LLM.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"VLLM_DP_SIZE": str(len(prompts)), "VLLM_DP_MASTER_PORT": str(port)}
    jobs = [
        _engine_process("this-cpu", rank).submit(
            _serve_rank, environment | {"VLLM_DP_RANK": str(rank)}, checkpoint, mine, tokens, arguments
        )
        for rank, mine in enumerate(prompts)
    ]
    try:
        for job in as_completed(jobs):
            job.result()
    except (Exception, pytest.fail.Exception):  # Without one of them the others would wait for ever.
        for process in multiprocessing.active_children():
            process.kill()
        _engine_process.cache_clear()
        raise
    return [job.result() for job in jobs]


def score(checkpoint: Path, sequences: list[list[int]], cpu: str, **arguments: Any) -> np.ndarray:
    """Log-probabilities of all tokens at each position of given sequences, which have one length.

    Returns:
        float64[sequences, tokens - 1, vocab].
    """
    return _in_engine_process(cpu, _score, checkpoint, sequences, arguments)


def classify(checkpoint: Path, sequences: list[list[int]], **arguments: Any) -> tuple[set[str], np.ndarray]:
    """The labels' scores of sequences, before any softmax, by a model whose head is a classifier.

    Returns:
        The classes that computed its MoE layers; and fp32[sequences, labels].
    """
    return _in_engine_process("this-cpu", _classify, checkpoint, sequences, arguments)


def fuse(
    checkpoint: Path, prompts: list[list[int]], tokens: int, **arguments: Any
) -> tuple[Served, list[list[int]]]:
    """`serve` through what vLLM's pass makes of all-reduces and norms (allreduce_fusion.py).

    Returns:
        What was answered; and for each rank how many it fused, in each graph that it compiled.
    """
    return _in_engine_process("this-cpu", _fuse, checkpoint, prompts, tokens, arguments)


def outcome(checkpoint: Path, environment: dict[str, str] | None = None, **arguments: Any) -> str:
    """Start an engine: "served by" and its MoE methods, or the error that ended it.

    Args:
        checkpoint: a directory.
        environment: variables that are set meanwhile.
        arguments: of vllm.LLM.
    """
    return _in_engine_process("this-cpu", _outcome, checkpoint, environment or {}, arguments)


def save(checkpoint: Path, directory: Path, **arguments: Any) -> list[str]:
    """The errors of saving a sharded state, and of a request."""
    return _in_engine_process("this-cpu", _save, checkpoint, directory, arguments)


def quantization_class(checkpoint: Path, quantization: str | None) -> str:
    """The class of vLLM's quantization config for a checkpoint and a flag, without building the model."""
    return _in_engine_process("this-cpu", create_config, checkpoint, quantization)


def worker_answers(
    checkpoint: Path, calls: list[tuple[str, ...]], cpu: str = "this-cpu", **arguments: Any
) -> list[dict[str, Any]]:
    """What a worker of `vllm-mxfp4 bench serve` answers to methods with arguments."""
    return _in_engine_process(cpu, _worker_answers, checkpoint, calls, arguments)


def random_prompts(directory: Path, inputs: int) -> list[int]:
    """Tokens of the prompts that vLLM's client makes of a tokenizer, when so many are asked for.

    Raises:
        VLLMValidationError: a server that takes so many would refuse a text for its length.
    """
    return _in_engine_process("this-cpu", _random_prompts, directory, inputs)


def create_config(checkpoint: Path, quantization: str | None) -> str:
    """What `quantization_class` does, in this process."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(str(checkpoint), quantization=quantization, max_model_len=256).create_engine_config()
    method = type(config.quant_config)
    return f"{method.__module__}.{method.__qualname__}"


def _in_engine_process(cpu: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return _engine_process(cpu).submit(function, *args, **kwargs).result()
    except (BrokenProcessPool, pytest.fail.Exception):  # Its process was ended: the next test gets another.
        _engine_process.cache_clear()
        raise


def renew() -> None:
    """End the engines' processes: the next engine gets another."""
    _engine_process("this-cpu").shutdown()
    _engine_process.cache_clear()


@functools.cache
def _engine_process(cpu: str, rank: int = 0) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=start, initargs=(cpu,))


def start(cpu: str = "this-cpu") -> None:
    """Make this process one for engines, on one of CPUS."""
    # Half of an imitation is no machine: vLLM's library for AVX-512 beside a torch for AVX2 answers with NaN.
    for name in AVX2:
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT | CPUS[cpu])
    if cpu == "avx2":  # vLLM asks torch what the CPU has, not what torch was told to use.
        for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            setattr(torch.cpu, name, lambda: False)
    torch.set_num_threads(1)
    import vllm  # noqa: F401

    gc.freeze()  # Each engine's shutdown collects garbage several times, over all of vLLM's modules.


@contextlib.contextmanager
def _llm(checkpoint: Path, arguments: dict[str, Any]) -> Iterator[LLM]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 2**26,
        "max_logprobs": -1,
        "max_model_len": 256,
    }
    llm = None
    try:
        llm = LLM(str(checkpoint), **defaults | arguments)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
        gc.freeze()


def serve_here(checkpoint: Path, prompts: list[list[int]], tokens: int, arguments: dict[str, Any]) -> Served:
    """What `serve` does, in this process."""
    with _llm(checkpoint, arguments) as llm:
        return _serve(llm, prompts, tokens)


def _serve_rank(
    environment: dict[str, str],
    checkpoint: Path,
    prompts: list[list[int]],
    tokens: int,
    arguments: dict[str, Any],
) -> Served:
    with mock.patch.dict(os.environ, environment):
        return serve_here(checkpoint, prompts, tokens, arguments)


def _serve_in_turn(
    checkpoint: Path, prompts: list[list[int]], tokens: int, turns: list[Turn], arguments: dict[str, Any]
) -> list[Served]:
    served = []
    with _llm(checkpoint, arguments) as llm:
        for turn in turns:
            for name, given in turn.calls:
                getattr(llm, name)(**given)
            served.append(_serve(llm, prompts, tokens, turn.adapter))
    return served


def _serve(llm: LLM, prompts: list[list[int]], tokens: int, adapter: Path | None = None) -> Served:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=TOP)
    methods = llm.apply_model(_moe_methods)
    lora = None if adapter is None else LoRARequest(adapter.name, 1, str(adapter))
    requests = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False, lora_request=lora
    )
    outputs = [request.outputs[0] for request in requests]
    metrics = llm.get_metrics() if llm.llm_engine.log_stats else []
    return Served(
        moe_methods=set().union(*methods),
        token_ids=[list(output.token_ids) for output in outputs],
        logprobs=[
            [{i: p.logprob for i, p in step.items()} for step in output.logprobs] for output in outputs
        ],
        accepted=sum(
            metric.value for metric in metrics if metric.name == "vllm:spec_decode_num_accepted_tokens"
        ),
    )


def _moe_methods(model: torch.nn.Module) -> set[str]:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    methods = [type(layer.quant_method) for layer in model.modules() if isinstance(layer, RoutedExperts)]
    return {f"{method.__module__}.{method.__qualname__}" for method in methods}


def _score(checkpoint: Path, sequences: list[list[int]], arguments: dict[str, Any]) -> np.ndarray:
    from vllm import SamplingParams

    with _llm(checkpoint, arguments) as llm:
        parameters = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True, detokenize=False
        )
        requests = llm.generate([{"prompt_token_ids": s} for s in sequences], parameters, use_tqdm=False)
    found = []
    for flat in (request.prompt_logprobs for request in requests):
        scores = np.full((len(flat) - 1, max(flat.token_ids) + 1), np.nan)
        for row, begin, end in zip(scores, flat.start_indices[1:], flat.end_indices[1:], strict=True):
            row[flat.token_ids[begin:end]] = flat.logprobs[begin:end]
        found.append(scores)
    return np.array(found)


def _classify(
    checkpoint: Path, sequences: list[list[int]], arguments: dict[str, Any]
) -> tuple[set[str], np.ndarray]:
    from vllm import PoolingParams

    with _llm(checkpoint, {"runner": "pooling"} | arguments) as llm:
        methods = llm.apply_model(_moe_methods)
        requests = llm.encode(
            [{"prompt_token_ids": sequence} for sequence in sequences],
            PoolingParams(use_activation=False),
            pooling_task="classify",
            use_tqdm=False,
        )
    return set().union(*methods), np.array([request.outputs.data.float().numpy() for request in requests])


def _fuse(
    checkpoint: Path, prompts: list[list[int]], tokens: int, arguments: dict[str, Any]
) -> tuple[Served, list[list[int]]]:
    compilation = {"mode": 2, "backend": "allreduce_fusion.compile_model", "ir_enable_torch_wrap": True}
    defaults = {
        "enforce_eager": False,
        "worker_extension_cls": "allreduce_fusion.Rank",
        "compilation_config": compilation,
    }
    with _llm(checkpoint, defaults | arguments) as llm:
        return _serve(llm, prompts, tokens), llm.collective_rpc("fused_matches")


def _worker_answers(
    checkpoint: Path, calls: list[tuple[str, ...]], arguments: dict[str, Any]
) -> list[dict[str, Any]]:
    from vllm_mxfp4_gfx950.bench import serve

    with _llm(checkpoint, {"worker_extension_cls": serve.WORKER} | arguments) as llm:
        return [llm.collective_rpc(method, args=tuple(args))[0] for method, *args in calls]


def _random_prompts(directory: Path, inputs: int) -> list[int]:
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.renderers import TokenizeParams
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(directory))
    samples = RandomDataset(random_seed=1).sample(tokenizer, 4, input_len=inputs)
    for sample in samples:
        TokenizeParams(inputs).apply_pre_tokenization(tokenizer, {"prompt": sample.prompt})
    return [len(tokenizer.encode(sample.prompt)) for sample in samples]


def _save(checkpoint: Path, directory: Path, arguments: dict[str, Any]) -> list[str]:
    errors = []
    with _llm(checkpoint, arguments) as llm:
        for call in (
            lambda: llm.collective_rpc("save_sharded_state", args=(str(directory),)),
            lambda: _serve(llm, [[1, 2, 3]], 1),
        ):
            try:
                call()
                errors.append("")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors


def _outcome(checkpoint: Path, environment: dict[str, str], arguments: dict[str, Any]) -> str:
    try:
        with mock.patch.dict(os.environ, environment), _llm(checkpoint, arguments) as llm:
            return f"served by {set().union(*llm.apply_model(_moe_methods))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
