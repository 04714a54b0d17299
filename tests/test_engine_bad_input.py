"""What cannot be served ends before it serves, says what to mend, and leaves nothing running."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine
import psutil
import pytest
import tiny_checkpoint
import torch
from engine import FLAG
from run_python import run_python
from safetensors.torch import load_file, save_file
from tiny_checkpoint import TinyGptOss

pytestmark = pytest.mark.engine

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

LAYER = "model.layers.1"
EXPERTS = f"{LAYER}.mlp.experts"
OTHER_MODEL: Config = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "vocab_size": 320,
}
FIX_LAYOUT = "Check that the checkpoint is GPT-OSS in MXFP4 and fits its config.json."
WRONG_METHOD = (
    "quantization_config.quant_method must be mxfp4 for --quantization mxfp4-triton; got {}. "
    "Serve this checkpoint without the flag, or use one of GPT-OSS's MXFP4 checkpoints."
)
FIX_MODEL = "Serve this model without --quantization mxfp4-triton."
FIX_SIZE = "MXFP4 stores blocks of 32 values; this model cannot be stored in it."


def write_changed(
    directory: Path,
    tensors: Callable[[Tensors], object] | None = None,
    config: Callable[[Config], object] | None = None,
) -> Path:
    """A checkpoint, after a change to its tensors or to its config.json."""
    tiny_checkpoint.write(TinyGptOss(), directory)
    if tensors is not None:
        content = load_file(directory / "model.safetensors")
        tensors(content)
        content = {name: tensor.contiguous() for name, tensor in content.items()}
        save_file(content, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        settings = json.loads((directory / "config.json").read_text())
        config(settings)
        (directory / "config.json").write_text(json.dumps(settings))
    return directory


def become(other: Config) -> Callable[[Config], None]:
    """Replace all of a config.json."""

    def change(config: Config) -> None:
        config.clear()
        config.update(other)

    return change


def put_nan(tensors: Tensors) -> None:
    """One NaN among the scales."""
    tensors[f"{EXPERTS}.down_proj_scales"][3, 5, 0] = 0xFF


def replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """Change one of a layer's expert tensors."""

    def apply(tensors: Tensors) -> None:
        tensors[f"{EXPERTS}.{name}"] = change(tensors[f"{EXPERTS}.{name}"])

    return apply


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(
            become(OTHER_MODEL),
            f"model_type must be gpt_oss; got llama. {FIX_MODEL}",
            id="other-model",
        ),
        pytest.param(
            become(OTHER_MODEL | {"quantization_config": {"quant_method": "mxfp4"}}),
            f"model_type must be gpt_oss; got llama. {FIX_MODEL}",
            id="other-model-in-mxfp4",
        ),
        pytest.param(
            lambda config: config.pop("quantization_config"),
            "config.json must be there; got none, though model.safetensors holds MXFP4. Restore it: ",
            id="unquantized",
        ),
        pytest.param(
            lambda config: config["quantization_config"].update(quant_method="fp8"),
            WRONG_METHOD.format("fp8"),
            id="fp8",
        ),
        pytest.param(
            lambda config: config.update(hidden_size=120),
            f"hidden_size must be a positive multiple of 32; got 120. {FIX_SIZE}",
            id="hidden-120",
        ),
        pytest.param(
            lambda config: config.update(intermediate_size=120),
            f"intermediate_size must be a positive multiple of 32; got 120. {FIX_SIZE}",
            id="intermediate-120",
        ),
        pytest.param(
            lambda config: config.update(num_experts_per_tok=9, experts_per_token=9),
            "topk must be between 1 and the number of experts, 8; got 9. "
            "Correct num_experts_per_tok in the model's config.json.",
            id="topk-above-experts",
        ),
        pytest.param(
            lambda config: config.update(num_experts=32),
            "config.json must be the same number; got 8 and 32, and 8 in the files. Delete num_experts.",
            id="two-counts",
        ),
    ],
)
def test_config(change: Callable[[Config], object], text: str, tmp_path: Path) -> None:
    """A config.json of something that the plugin does not serve."""
    outcome = engine.outcome(write_changed(tmp_path, config=change), quantization=FLAG, dtype="bfloat16")
    assert text in outcome


@pytest.mark.parametrize(
    ("change", "text"),
    [
        pytest.param(
            replace("down_proj_scales", torch.Tensor.float),
            f"{EXPERTS}.down_proj_scales must be U8 or F8_E8M0 [8, 128, 4]; "
            f"got F32 [8, 128, 4]. {FIX_LAYOUT}",
            id="scales-of-float32",
        ),
        pytest.param(
            replace("gate_up_proj_scales", lambda scales: scales[..., :-1]),
            f"{EXPERTS}.gate_up_proj_scales must be U8 or F8_E8M0 [8, 256, 4]; "
            f"got U8 [8, 256, 3]. {FIX_LAYOUT}",
            id="scales-of-3-blocks",
        ),
        pytest.param(
            replace("down_proj_bias", lambda bias: bias[:, :-1]),
            f"{EXPERTS}.down_proj_bias must be BF16 or F16 or F32 [8, 128]; got BF16 [8, 127]. {FIX_LAYOUT}",
            id="short-bias",
        ),
        pytest.param(
            put_nan,
            f"{EXPERTS}.w2_scale must be free of NaN scales (0xFF); got 1 of them. Run `hf cache verify`, ",
            id="nan-scale",
        ),
        pytest.param(
            lambda tensors: tensors.pop(f"{EXPERTS}.down_proj_scales"),
            f"must be the whole checkpoint; got 40 tensors without {EXPERTS}.down_proj_scales. "
            "Download the files that are missing, ",
            id="no-scales",
        ),
        pytest.param(
            lambda tensors: tensors.pop(f"{LAYER}.self_attn.sinks"),
            f"must be the whole checkpoint; got 40 tensors without {LAYER}.self_attn.sinks. "
            "Download the files that are missing, ",
            id="no-sinks",
        ),
    ],
)
def test_tensors(change: Callable[[Tensors], object], text: str, tmp_path: Path) -> None:
    """Tensors that do not fit the config.json, or are broken, or are not there."""
    outcome = engine.outcome(write_changed(tmp_path, tensors=change), quantization=FLAG, dtype="bfloat16")
    assert text in outcome


def test_file_cut_off(tmp_path: Path) -> None:
    """An interrupted download."""
    file = tiny_checkpoint.write(TinyGptOss(), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    outcome = engine.outcome(tmp_path, quantization=FLAG, dtype="bfloat16")
    assert re.search(
        r"model\.safetensors must be a whole safetensors file; got .*\. Download it anew: .*", outcome
    )


def test_float16(tmp_path: Path) -> None:
    """Activations that no backend takes."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="float16")
    assert "--dtype must be torch.bfloat16 or torch.float32 on cpu; got torch.float16. Serve with" in outcome


def test_sharded_state(tmp_path: Path) -> None:
    """What a server would have saved, which has no experts, and would be loaded past their loaders."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16", load_format="sharded_state")
    assert "--load-format must be one that reads a checkpoint; got sharded_state. Leave it out" in outcome


def test_model_impl(tmp_path: Path) -> None:
    """Transformers' model asks for no method of ours: dummy weights would be served without it."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    other = {"model_impl": "transformers", "load_format": "dummy"}
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16", **other)
    text = (
        f"the model must be vLLM's own for --quantization {FLAG}; got transformers'. Leave out --model-impl"
    )
    assert text in outcome


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (None, "nothing"),
        (["qkv_proj", "experts"], "experts"),
        (["model.layers.0.mlp.router"], "model.layers.0.mlp.router"),
    ],
    ids=["all", "experts", "router"],
)
def test_lora(names: list[str] | None, found: str, tmp_path: Path) -> None:
    """Adapters that may change the experts, or what routes to them."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    adapters = {"enable_lora": True, "lora_target_modules": names}
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16", **adapters)
    rest = (
        f"where --enable-lora meets --quantization {FLAG}; got {found}. Name what else your adapters change"
    )
    assert f"--lora-target-modules must be given, without experts or their router, {rest}" in outcome


@pytest.mark.parametrize(
    ("change", "text"),
    [
        # Found by vLLM's first process.
        pytest.param(
            {"config": lambda config: config["quantization_config"].update(quant_method="fp8")},
            WRONG_METHOD.format("fp8"),
            id="fp8",
        ),
        # Found by two ranks at once, each in its own process, below vLLM's engine, which has its own.
        pytest.param(
            {"tensors": put_nan},
            f"{EXPERTS}.w2_scale must be free of NaN scales (0xFF); got 1 of them.",
            marks=pytest.mark.load,
            id="nan-scale",
        ),
    ],
)
def test_vllm_serve(change: dict[str, Any], text: str, tmp_path: Path) -> None:
    """`vllm serve` with two ranks exits with an error, and all of its processes end."""
    checkpoint = write_changed(tmp_path / "checkpoint", **change)
    mark = f"VLLM_TEST_MARK={tmp_path}"
    command = [Path(sys.executable).with_name("vllm"), "serve", checkpoint, "--quantization", FLAG]
    command += ["--tensor-parallel-size", "2", "--enforce-eager", "--max-model-len", "256"]
    command += ["--kv-cache-memory-bytes", str(2**26), "--port", "0"]
    environment = os.environ | engine.ENVIRONMENT | {"VLLM_TEST_MARK": str(tmp_path)}
    log = tmp_path / "log"
    try:
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
            while not processes_with(mark):  # Its environment shows a moment after it has begun.
                assert server.poll() is None
            assert server.wait() != 0
        assert text in log.read_text()
        assert "Application startup complete" not in log.read_text()
        while left := processes_with(mark):
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.wait_procs([psutil.Process(pid) for pid in left], timeout=5)
    finally:
        for pid in processes_with(mark):
            os.kill(pid, signal.SIGKILL)


def processes_with(mark: str) -> dict[int, str]:
    """The command line of each process that was started with this in its environment, by its id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:  # It has ended, or it is not ours.
            continue
    return found


def test_moe_backend(tmp_path: Path) -> None:
    """Another choice of kernels, which would have no effect."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16", moe_backend="triton")
    assert "--moe-backend must be auto with --quantization mxfp4-triton; got triton. Leave it out" in outcome


@pytest.mark.parametrize(
    ("argument", "flag", "value"),
    [("cpu_offload_gb", "--cpu-offload-gb", "1.0"), ("offload_group_size", "--offload-group-size", "1")],
)
def test_offload(argument: str, flag: str, value: str, tmp_path: Path) -> None:
    """Weights in the host's memory, where prepared experts would not be."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path)
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16", **{argument: 1})
    assert f"{flag} must be 0; got {value}. Leave it out: prepared experts stay where they are." in outcome


def test_saved(tmp_path: Path) -> None:
    """A state that would lack the experts, with a request behind."""
    checkpoint = tiny_checkpoint.write(TinyGptOss(), tmp_path / "checkpoint")
    state = tmp_path / "state"
    state.mkdir()
    arguments = {"quantization": FLAG, "dtype": "bfloat16"}
    saved, served = engine.save(checkpoint, state, **arguments)
    assert saved == (
        "Mxfp4Error: model.layers.0.mlp.experts.routed_experts.* must be left out of any saved state; "
        "got state_dict(). Keep the checkpoint that the model was loaded from: "
        "prepared experts cannot be saved."
    )
    assert list(state.iterdir()) == []
    assert served == ""


PARALLELISM = """
import json
from types import SimpleNamespace as Object
from vllm_mxfp4_gfx950 import backends, vllm_checks

parallel = Object(ep_size=1, enable_eplb=False)
moe = Object(hidden_dim=128, intermediate_size=128, num_experts=8, moe_parallel_config=parallel,
             is_lora_enabled=False, moe_backend="auto")
config = Object(
    lora_config=Object(),  # Without a choice of modules, as in older vLLMs.
    # Without context parallelism, as in older vLLMs.
    parallel_config=Object(data_parallel_size=1, all2all_backend="allgather_reducescatter"),
    offload_config=Object(uva=Object(cpu_offload_gb=0), prefetch=Object(offload_group_size=0)),
    model_config=Object(enable_return_routed_experts=False),
    load_config=Object(load_format="dummy"),
)

def refusal(function, *arguments):
    try:
        function(*arguments)
    except vllm_checks.Mxfp4Error as error:
        return str(error)

texts = {}
for name, holder, attribute, value in (
    ("ranks", moe.moe_parallel_config, "ep_size", 3),
    ("eplb", moe.moe_parallel_config, "enable_eplb", True),
    ("dp", config.parallel_config, "data_parallel_size", 2),
    ("lora", moe, "is_lora_enabled", True),
    ("routed experts of vLLM 0.24 to 0.30", config.model_config, "enable_return_routed_experts", True),
    ("sharded_state", config.load_config, "load_format", "sharded_state"),
    ("runai_streamer_sharded", config.load_config, "load_format", "runai_streamer_sharded"),
    ("tensorizer", config.load_config, "load_format", "tensorizer"),
    ("pcp", config.parallel_config, "prefill_context_parallel_size", 2),
    ("no pcp", config.parallel_config, "prefill_context_parallel_size", 1),
):
    usual = getattr(holder, attribute, 1)
    setattr(holder, attribute, value)
    texts[name] = refusal(vllm_checks.check_servable, config, moe)
    setattr(holder, attribute, usual)
config.parallel_config.data_parallel_size = config.parallel_config.prefill_context_parallel_size = 2
texts["pcp and dp"] = refusal(vllm_checks.check_servable, config, moe)
config.parallel_config.all2all_backend = "deepep_low_latency"
texts["all2all"] = refusal(vllm_checks.check_servable, config, moe)
del vllm_checks.MoERunner.do_naive_dispatch_combine
texts["dp without a gather"] = refusal(vllm_checks.check_servable, config, moe)
for arch, eager in (("gfx950", False), ("gfx950", True), ("cpu", False)):
    selection = backends.Selection(backends.reference, arch, ())
    texts[f"{arch} {eager}"] = refusal(
        vllm_checks.check_capture, Object(model_config=Object(enforce_eager=eager)), selection
    )
print(json.dumps(texts))
"""


def test_parallelism_and_capture() -> None:
    """Ways of running that this package does not serve, told from what vLLM describes to a layer."""
    result = run_python(["-c", PARALLELISM])
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "ranks": "the number of expert-parallel ranks must be a divisor of 8; got 3. Change it.",
        "eplb": "--enable-eplb must be off; got on. Leave it out: experts cannot be moved between ranks.",
        "dp": None,
        "all2all": (
            "--all2all-backend must be allgather_reducescatter with --quantization mxfp4-triton; "
            "got deepep_low_latency. Leave it out."
        ),
        "dp without a gather": (
            "--data-parallel-size must be 1 with this vLLM, which gathers tokens for its own kernels only; "
            "got 2. Start one server for each replica instead."
        ),
        "lora": (
            "--lora-target-modules must be given, without experts or their router, where --enable-lora meets "
            "--quantization mxfp4-triton; got nothing. Name what else your adapters change, such as "
            "qkv_proj o_proj, or serve them without the flag."
        ),
        "routed experts of vLLM 0.24 to 0.30": (
            "--enable-return-routed-experts must be off; got on. "
            "Leave it out: the routing is inside of the layer."
        ),
        **{
            state: f"--load-format must be one that reads a checkpoint; got {state}. "
            "Leave it out, and serve the checkpoint that the state was made from."
            for state in ("sharded_state", "runai_streamer_sharded", "tensorizer")
        },
        "pcp": "--prefill-context-parallel-size must be 1; got 2. Leave it out.",
        "pcp and dp": "--prefill-context-parallel-size must be 1; got 2. Leave it out.",
        "no pcp": None,
        "gfx950 False": (
            "--enforce-eager must be given for the reference backend on a GPU; got nothing. "
            "Add --enforce-eager, or choose another with VLLM_MXFP4_BACKEND."
        ),
        "gfx950 True": None,
        "cpu False": None,
    }


class Marker:
    """A pickle of it leaves a file behind where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.file,)


@pytest.mark.parametrize(
    ("file", "load_format", "text"),
    [
        ("pytorch_model.bin", "auto", r".* must be a checkpoint in safetensors; got pytorch_model\.bin"),
        ("model.pt", "auto", r".* must be a checkpoint in safetensors; got model\.pt"),
        ("model.pt", "pt", "--load-format must be one that reads safetensors; got pt. Leave it out."),
        ("pytorch_model.bin", "npcache", "--load-format must be one that reads safetensors; got npcache."),
    ],
)
def test_pickle(file: str, load_format: str, text: str, tmp_path: Path) -> None:
    """A checkpoint that could run code is not opened."""
    tiny_checkpoint.write(TinyGptOss(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    torch.save({"lm_head.weight": Marker(touched)}, tmp_path / file)
    outcome = engine.outcome(tmp_path, quantization=FLAG, dtype="bfloat16", load_format=load_format)
    assert re.search(text, outcome)
    assert not touched.exists()
    # Negative control: it would have run.
    torch.load(tmp_path / file, weights_only=False)
    assert touched.exists()


def test_code_beside_the_checkpoint(tmp_path: Path) -> None:
    """A config.json that names code of its own is served without that code."""
    touched = tmp_path / "touched"
    code = f"import pathlib\npathlib.Path({str(touched)!r}).touch()\nclass Config: ...\nclass Model: ..."
    checkpoint = write_changed(
        tmp_path / "checkpoint",
        config=lambda config: config.update(
            auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
        ),
    )
    (checkpoint / "code.py").write_text(code)
    outcome = engine.outcome(checkpoint, quantization=FLAG, dtype="bfloat16")
    assert outcome == f"served by {{'{engine.OUR_METHOD}'}}"
    assert not touched.exists()
    exec(code)  # Negative control.
    assert touched.exists()
