"""What is asked of a running server: its worker's facts, and its times by vLLM's own client."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mxfp4_gfx950.errors import Mxfp4Error, brief, first_error
from vllm_mxfp4_gfx950.process import ServerProcess, did_not_start

if TYPE_CHECKING:
    from vllm_mxfp4_gfx950.bench.serve import Load

SECONDS = 600
"""That a worker may take to answer."""

LOOK_SECONDS = 1
"""Between two looks at a server while the client measures it."""


def call(url: str, method: str, *arguments: str) -> Any:
    """What a method of `vllm_worker.Worker` returns on the first rank, after all have run it.

    Source: vLLM's route for developers, vllm/entrypoints/serve/dev/rpc/api_router.py, v0.26.0.

    Raises:
        Mxfp4Error: a rank's refusal; or there was no answer.
    """
    import requests

    request = {"method": method, "args": arguments}
    try:
        answer = requests.post(f"{url}/collective_rpc", json=request, timeout=SECONDS)
        answer.raise_for_status()
    except requests.RequestException as error:
        name = f"{method} of the server"
        raise Mxfp4Error(name, "answered", brief(error), "Read the server's log") from error
    results = answer.json()["results"]
    for result in results:
        if "refused" in result:
            raise Mxfp4Error(*result["refused"])
    return results[0]["done"]


class Client:
    """`vllm bench serve` in processes that find vLLM imported already, which takes longer than many a load.

    Args:
        directory: gets results and client.log.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.log = directory, directory / "client.log"
        self.numbers = itertools.count()
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["vllm.benchmarks.serve", "vllm.tokenizers.hf"])

    def measure(
        self, server: ServerProcess, model: str, load: Load, requests: int, seed: int
    ) -> dict[str, Any]:
        """The client's result.

        Args:
            server: which answers.
            model: its name there, and where its tokenizer is.
            load: requests at a time, and of each of them input and output tokens.
            requests: how many there are.
            seed: of their texts.

        Raises:
            Mxfp4Error: the server ended meanwhile, or the client says that something went wrong.
        """
        batch, inputs, outputs = load
        file = self.directory / f"result-{next(self.numbers)}.json"
        lengths = ["--random-input-len", str(inputs), "--random-output-len", str(outputs)]
        arguments = [
            *("--backend", "vllm", "--base-url", server.url, "--model", model, "--temperature", "0"),
            *("--dataset-name", "random", *lengths, "--random-range-ratio", "0", "--ignore-eos"),
            *("--num-prompts", str(requests), "--max-concurrency", str(batch), "--seed", str(seed)),
            *("--save-result", "--result-dir", str(file.parent), "--result-filename", file.name),
            "--disable-tqdm",
        ]
        process = self.processes.Process(target=run, args=(arguments, self.log), daemon=True)
        process.start()
        try:
            while process.is_alive():
                process.join(LOOK_SECONDS)
                if server.main.poll() is not None:
                    raise did_not_start(server.main.returncode, server.log, "running until it is measured")
        finally:
            process.kill()
            process.join()
        if process.exitcode or not file.is_file():
            said = first_error(self.log.read_text(errors="replace")) or f"exit code {process.exitcode}"
            raise Mxfp4Error("vLLM's client", "able to measure", said.rstrip("."), f"Read {self.log}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


def run(arguments: list[str], log: Path) -> None:
    """`vllm bench serve` in this process, whose output becomes the log."""
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args(arguments))
