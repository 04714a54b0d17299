"""Ask one side: the questions of lm-eval's tasks, and what it expects at each token of a text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief
from vllm_mxfp4_gfx950.evaluation.compare import Position
from vllm_mxfp4_gfx950.evaluation.server import Server, post
from vllm_mxfp4_gfx950.evaluation.side import digest

METRICS = ("exact_match", "acc")
"""Metrics that are right or wrong for each question; a task's first of these counts."""

FLEXIBLE = "flexible-extract"
"""The filter whose score the field publishes for gsm8k. A task without it is scored by its first filter."""

NOT_FINITE = "Out of range float values"
"""Python's JSON says so of NaN, and vLLM passes it on instead of an answer."""

FIELD_ARGUMENTS = {"max_retries": 3, "max_gen_toks": 2048, "tokenized_requests": False}
"""Of lm-eval's API models. Source: the calls that vLLM's pull requests on GPT-OSS give with their scores."""


@dataclass(frozen=True)
class Question:
    """One question of a task, and whether it was answered right.

    Args:
        task: its name.
        doc_id: lm-eval's number of the question in the task.
        asked: hash of the question, of the prompt made of it, and of its answer.
        right: the score.
        answer: what the task took from the server's answer, shortened.
        empty: the server answered nothing, for instance as it was still thinking at the last token.
    """

    task: str
    doc_id: int
    asked: str
    right: bool
    answer: str
    empty: bool


class Tasks:
    """Tasks of lm-eval, found before any server is started.

    Args:
        names: tasks, groups or tags; empty for all in `folder`.
        folder: with task files of one's own; None for those that come with lm-eval.

    Raises:
        Mxfp4Error: there is no such task, or its score is not right or wrong.
    """

    def __init__(self, names: list[str], folder: Path | None) -> None:
        from lm_eval.tasks import TaskManager

        self.manager = TaskManager(include_path=folder, include_defaults=folder is None)
        self.names = names or self.manager.all_subtasks
        unknown = sorted(set(self.names) - set(self.manager.all_tasks))
        if unknown or not self.names:
            known = f"a task in {folder}" if folder else "a task of lm-eval"
            raise Mxfp4Error("--tasks", known, ", ".join(unknown) or "none", "Correct it")
        try:
            self.loaded: dict[str, Any] = self.manager.load(self.names)["tasks"]
        except Exception as error:  # Whatever the task's own code and the loaders of its data raise.
            fix = "Correct it, or where the data is downloaded, do that once with a network"
            raise Mxfp4Error(f"--tasks {' '.join(self.names)}", "loadable here", brief(error), fix) from error
        for name, task in self.loaded.items():
            if not set(METRICS) & set(task.aggregation()):
                rule = f"scored by {' or '.join(METRICS)}"
                raise Mxfp4Error(f"task {name}", rule, ", ".join(task.aggregation()), "Choose another")
        self.generate = all(task.OUTPUT_TYPE == "generate_until" for task in self.loaded.values())

    def identity(self) -> str:
        """A hash of what is asked and how it is scored."""
        content = [(name, task.dump_config(), list(task.eval_docs)) for name, task in self.loaded.items()]
        return digest(
            json.dumps(content, default=lambda value: type(value).__name__, sort_keys=True).encode()
        )


def choose_endpoint(wanted: str | None, server: Server, tasks: Tasks) -> str:
    """The endpoint that scores this model right.

    Args:
        wanted: "chat" or "completions"; None leaves the choice to what the tokenizer has.
        server: that is to answer.
        tasks: to be asked.

    Raises:
        Mxfp4Error: the wanted endpoint, or each, would score the model wrong.
    """
    endpoint = wanted or ("chat" if server.harmony else "completions")
    if endpoint == "completions" and server.harmony:
        found = "completions for a model that speaks harmony, which answers without its channels are not"
        fix = "Use chat: gsm8k of GPT-OSS-120B scores 0.30 by completions and 0.90 by chat"
        raise Mxfp4Error("--endpoint", "chat", found, fix)
    if endpoint == "chat" and not tasks.generate:
        fix = "Choose tasks with output_type generate_until"
        if not server.harmony:
            fix += ", or --endpoint completions"
        raise Mxfp4Error("the tasks", "answered in text over chat", "ones scored by log-likelihood", fix)
    return endpoint


def ask(
    server: Server,
    endpoint: str,
    tasks: Tasks,
    limit: int | None,
    concurrency: int,
    cache: Path | None,
) -> list[Question]:
    """Ask a server all questions. lm-eval shows its progress.

    Args:
        server: that answers.
        endpoint: "chat" or "completions".
        tasks: to be asked.
        limit: of the questions of each task.
        concurrency: requests at a time.
        cache: where lm-eval keeps each answer as it comes, and looks for it first; None to keep none.
    """
    from lm_eval import simple_evaluate

    chat = endpoint == "chat"
    url = f"{server.url}/v1/{'chat/completions' if chat else 'completions'}"
    prompt = {"messages": [{"role": "user", "content": "1"}]} if chat else {"prompt": "1"}
    # Refused here, it is refused with its reason.
    post(url, {"model": server.model, "max_tokens": 1} | prompt, server.access)
    arguments: dict[str, Any] = {"model": server.model, "base_url": url, "num_concurrent": concurrency}
    arguments |= FIELD_ARGUMENTS
    arguments |= {"verify_certificate": server.access.verify, "header": server.access.headers() or None}
    if tasks.generate:
        arguments["tokenizer_backend"] = None
    else:
        # The context's length in tokens says where the scored continuation begins.
        arguments |= {"tokenizer_backend": "huggingface", "tokenized_requests": True}
        arguments["tokenizer"] = server.tokenizer
        arguments["max_length"] = server.context
    results = simple_evaluate(
        model=f"local-{'chat-' if chat else ''}completions",
        model_args=arguments,
        tasks=tasks.names,
        task_manager=tasks.manager,
        limit=limit,
        use_cache=str(cache) if cache else None,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=0,
    )
    return [question for task, samples in results["samples"].items() for question in questions(task, samples)]


def questions(task: str, samples: list[dict[str, Any]]) -> Iterator[Question]:
    """What lm-eval logged of a task, each question once."""
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    chosen = FLEXIBLE if FLEXIBLE in filters else filters[0]
    for sample in samples:
        if sample["filter"] != chosen:
            continue
        score = sample[next(metric for metric in METRICS if metric in sample["metrics"])]
        if score not in (0, 1):
            raise Mxfp4Error(f"task {task}", "right or wrong for each question", score, "Choose another")
        hashes = (sample[f"{part}_hash"] for part in ("doc", "prompt", "target"))
        texts = [text for replies in sample["resps"] for text in replies if isinstance(text, str)]
        yield Question(
            task=task,
            doc_id=sample["doc_id"],
            asked=digest(*(value.encode() for value in hashes)),
            right=bool(score),
            answer=chosen_answer(sample["filtered_resps"])[:200],
            empty=bool(texts) and not any(text.strip() for text in texts),
        )


def chosen_answer(responses: list[Any]) -> str:
    """The text, or among choices that each have a log-likelihood the number of the likeliest."""
    if isinstance(responses[0], str):
        return responses[0]
    return str(max(range(len(responses)), key=lambda choice: responses[choice][0]))


def read(server: Server, text: str, top: int, window: int) -> list[Position]:
    """What a server expects at each token of a text, which it reads in windows that do not overlap.

    A window in which the server computes NaN is NaN throughout.

    Args:
        server: that answers.
        text: at least two tokens.
        top: how many of the likeliest tokens to report; -1 for the whole vocabulary.
        window: in tokens. The first of each has nothing before it, and is not compared.

    Raises:
        Mxfp4Error: the text is too short, or the server refuses.
    """
    from tqdm import tqdm

    request = {"model": server.model, "prompt": text, "add_special_tokens": False}
    tokens = post(f"{server.url}/tokenize", request, server.access)["tokens"]
    if len(tokens) < 2:
        raise Mxfp4Error("the text", "at least two tokens", len(tokens), "Name another file")
    window = min(window, server.context - 1)
    windows = [tokens[start : start + window] for start in range(0, len(tokens), window)]
    expected = expected_by_sglang if server.owner == "sglang" else expected_by_vllm
    progress = tqdm(windows, desc="Reading the text")
    return [found for prompt in progress for found in expected(server, prompt, top)]


def expected_by_vllm(server: Server, prompt: list[int], top: int) -> list[Position]:
    """What vLLM expects at each token of a prompt but the first."""
    request = {"model": server.model, "prompt": prompt, "max_tokens": 1, "temperature": 0}
    request["prompt_logprobs"] = top
    try:
        choice = post(f"{server.url}/v1/completions", request, server.access)["choices"][0]
    except Mxfp4Error as error:
        if NOT_FINITE not in str(error):
            raise
        return [Position(token, "", math.nan, {token: math.nan}, "") for token in prompt[1:]]
    pairs = zip(prompt[1:], choice["prompt_logprobs"][1:], strict=True)
    return [position(token, found, top) for token, found in pairs]


def expected_by_sglang(server: Server, prompt: list[int], top: int) -> list[Position]:
    """What SGLang expects at each token of a prompt but the first; its JSON has null for NaN.

    Raises:
        Mxfp4Error: all tokens are wanted, which SGLang reports by number only.
    """
    if top == -1:
        raise Mxfp4Error("--top", "at least 1 for a server of SGLang", top, "Give a number")
    request = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top,
    }
    found = post(f"{server.url}/generate", request, server.access)["meta_info"]
    pairs = zip(found["input_token_logprobs"][1:], found["input_top_logprobs"][1:], strict=True)
    return [
        Position(
            token=token,
            text=text,
            logprob=math.nan if logprob is None else logprob,
            top={number: math.nan if each is None else each for each, number, _ in best},
            top_text=best[0][2],
        )
        for (logprob, token, text), best in pairs
    ]


def position(token: int, found: dict[str, dict[str, Any]], top: int) -> Position:
    """One entry of vLLM's `prompt_logprobs`: the likeliest tokens, and the text's own wherever it ranks."""
    ranked = sorted(found.items(), key=lambda item: item[1]["rank"])
    own = found[str(token)]
    best = ranked if top == -1 else ranked[:top]
    return Position(
        token=token,
        text=own["decoded_token"],
        logprob=own["logprob"],
        top={int(number): entry["logprob"] for number, entry in best},
        top_text=ranked[0][1]["decoded_token"],
    )
