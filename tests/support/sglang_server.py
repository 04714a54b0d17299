"""A stand-in for SGLang's server: the routes that `eval` asks, answered by transformers in float32.

    python -m sglang.launch_server --model-path MODEL --api-key KEY --host HOST --port PORT

A request may have the fields that SGLang's own classes have. Source: SGLang 0.5.23, in srt
entrypoints/http_server.py, managers/io_struct.py and managers/tokenizer_manager.py.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import tiny_checkpoint
import torch
from tokenizers import Tokenizer

CLASSES = {
    "/generate": ("managers/io_struct.py", "GenerateReqInput"),
    "/tokenize": ("entrypoints/openai/protocol.py", "TokenizeRequest"),
    "/v1/completions": ("entrypoints/openai/protocol.py", "CompletionRequest"),
}


def fields(source: Path, file: str, name: str) -> set[str]:
    """Of a class of SGLang's."""
    classes = [node for node in ast.parse((source / file).read_text()).body if isinstance(node, ast.ClassDef)]
    (found,) = [each for each in classes if each.name == name]
    return {
        node.target.id
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


class Routes(BaseHTTPRequestHandler):
    """What is asked."""

    model: ClassVar[Path]
    key: ClassVar[str]
    tokenizer: ClassVar[Tokenizer]
    known: ClassVar[dict[str, set[str]]]

    def do_GET(self) -> None:
        """Health, and the model."""
        served = {"id": str(self.model), "owned_by": "sglang", "root": str(self.model), "max_model_len": 256}
        self.reply({"data": [served]} if self.path in ("/health", "/v1/models") else None)

    def do_POST(self) -> None:
        """One of CLASSES."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not {*request} <= self.known[self.path]:
            self.reply(None)
        elif self.path == "/tokenize":
            self.reply({"tokens": self.tokenizer.encode(request["prompt"], add_special_tokens=False).ids})
        elif self.path == "/generate":
            assert request["return_logprob"]
            assert request["return_text_in_logprobs"]
            assert request["logprob_start_len"] == 0
            self.reply({"text": "", "meta_info": self.logprobs(request)})
        else:
            texts = [request["prompt"]] if isinstance(request["prompt"], str) else request["prompt"]
            prompts = [self.tokenizer.encode(text).ids for text in texts]
            rows = tiny_checkpoint.transformers_logprobs(self.model, prompts)
            answers = [self.tokenizer.decode([int(row[-1].argmax())]) for row in rows]
            self.reply({"choices": [{"index": i, "text": text} for i, text in enumerate(answers)]})

    def logprobs(self, request: dict[str, Any]) -> dict[str, list[Any]]:
        """Of a prompt: a triple for each token, and for each the likeliest, of which the first has none."""
        prompt = request["input_ids"]
        rows = tiny_checkpoint.transformers_logprobs(self.model, [prompt])[0][:-1]
        own = [self.triple(row, token) for row, token in zip(rows, prompt[1:], strict=True)]
        best = [[self.triple(row, int(n)) for n in row.topk(request["top_logprobs_num"])[1]] for row in rows]
        return {"input_token_logprobs": [[None, prompt[0], ""], *own], "input_top_logprobs": [None, *best]}

    def triple(self, row: torch.Tensor, token: int) -> list[Any]:
        """As SGLang has it."""
        return [float(row[token]), token, self.tokenizer.decode([token], skip_special_tokens=False)]

    def reply(self, content: Any) -> None:
        """With 401 for who has no key, and 400 for nothing to say."""
        allowed = self.path == "/health" or self.headers["Authorization"] == f"Bearer {self.key}"
        text = json.dumps(content).encode()
        self.send_response(401 if not allowed else 400 if content is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser()
    for name in ("model-path", "api-key", "host", "port"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    print(
        f"server_args={{'model_path': '{args.model_path}', 'moe_runner_backend': 'triton_kernel'}}",
        flush=True,
    )
    Routes.model, Routes.key = Path(args.model_path), args.api_key
    Routes.tokenizer = Tokenizer.from_file(str(Routes.model / "tokenizer.json"))
    source = Path(os.environ["SGLANG_SOURCE"])
    Routes.known = {route: fields(source, *each) for route, each in CLASSES.items()}
    HTTPServer((args.host, int(args.port)), Routes).serve_forever()


if __name__ == "__main__":
    main()
