"""The SGLang adapter: SGLang's own Python builds, loads and runs one layer, without and with the opt-in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from overrides import check_overrides
from run_python import ROOT, SUPPORT, run_python

from vllm_mxfp4_gfx950 import sglang_plugin

EXPERTS = "model.layers.0.mlp.experts"
ON = "with VLLM_MXFP4_SGLANG=1"
NOT_MOVED = "Leave it out: experts cannot be moved between ranks."
ROUTED_INSIDE = "Leave it out: the routing is inside of the layer."
OTHER_PLAN = "Leave it out, or serve without VLLM_MXFP4_SGLANG."
ADAPTERS = "Serve adapters without VLLM_MXFP4_SGLANG."
STAY = "Leave it out: prepared experts stay where they are."

REFUSED = {
    "enable_eplb": f"--enable-eplb must be False {ON}; got True. {NOT_MOVED}",
    "init_expert_location": f"--init-expert-location must be trivial {ON}; got random. {NOT_MOVED}",
    "ep_num_redundant_experts": f"--ep-num-redundant-experts must be 0 {ON}; got 2. {NOT_MOVED}",
    "elastic_ep_backend": f"--elastic-ep-backend must be None {ON}; got mooncake. {NOT_MOVED}",
    "moe_dp_size": f"--moe-dp-size must be 1 {ON}; got 2. {OTHER_PLAN}",
    "enable_lora": f"--enable-lora must be None or False {ON}; got True. {ADAPTERS}",
    "lora_paths": f"--lora-paths must be None {ON}; got ['adapter']. {ADAPTERS}",
    "enable_return_routed_experts": "--enable-return-routed-experts must be False "
    f"{ON}; got True. {ROUTED_INSIDE}",
    "expert_distribution_recorder_mode": "--expert-distribution-recorder-mode must be None "
    f"{ON}; got stat. {ROUTED_INSIDE}",
    "cpu_offload_gb": f"--cpu-offload-gb must be 0 {ON}; got 1. {STAY}",
    "offload_group_size": f"--offload-group-size must be -1 {ON}; got 2. {STAY}",
    "load_format": "--load-format must be auto or safetensors or fastsafetensors or runai_streamer or dummy "
    f"{ON}; got sharded_state. Leave it out.",
    "moe_runner_backend": f"--moe-runner-backend must be auto or triton_kernel {ON}; got flashinfer_mxfp4. "
    "Leave it out, or choose a backend with VLLM_MXFP4_BACKEND.",
    "moe_a2a_backend": f"--moe-a2a-backend must be none {ON}; got deepep. {OTHER_PLAN}",
    "enable_dp_attention": f"--enable-dp-attention must be off {ON}; got on. {OTHER_PLAN}",
    "SGLANG_AITER_FUSE_RMSNORM_PAD": f"SGLANG_AITER_FUSE_RMSNORM_PAD must be off {ON}; got on. "
    "Unset it: our layers take activations as wide as the model.",
}


@pytest.fixture(scope="module", name="distribution")
def fixture_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with this tree's entry points."""
    distribution = tmp_path_factory.mktemp("distribution")
    info = distribution / "vllm_mxfp4_gfx950-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-mxfp4-gfx950\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text((ROOT / "entry_points.cfg").read_text())
    return distribution


@pytest.fixture(
    scope="module", name="seen", params=["0.5.23", pytest.param("0.5.16", marks=pytest.mark.load)]
)
def fixture_seen(request: pytest.FixtureRequest, packages: Path, distribution: Path) -> dict[str, Any]:
    """What the script saw."""
    script = SUPPORT / "load_in_sglang.py"
    result = run_python([str(script)], [distribution, packages / f"sglang-{request.param}"])
    assert result.returncode == 0, result.stdout + result.stderr
    seen: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return seen


def test_without_the_opt_in(seen: dict[str, Any]) -> None:
    """SGLang's own method and routing, and nothing of ours but an entry point that returned."""
    without = seen["without"]
    assert without["end"] == ""
    assert "Executed general plugin: mxfp4_triton" in without["lines"]
    assert without["method"] == "Mxfp4MoEMethod"
    assert not without["bypassed"]
    assert not [line for line in without["lines"] if "MoE layers" in line or "hook(s)" in line]


def test_with_the_opt_in(seen: dict[str, Any]) -> None:
    """Our method, the line that says so once for each kind of layer, and no parameter left to be read."""
    lines = seen["with"]["lines"]
    assert seen["with"]["end"] == ""
    assert seen["with"]["method"] == "ExpertsMethod"
    assert sum("Applied 1 hook(s) to sglang.srt.models.gpt_oss.GptOssSparseMoeBlock" in x for x in lines) == 1
    chosen = [line for line in lines if line.startswith("MoE layers run through reference on cpu (torch ")]
    shapes = ["E=8 topk=2 H=96 I=96", "E=4 of 8 topk=2 H=96 I=160", "E=8 topk=2 H=96 I=160"]
    assert [re.sub(r".*Each is (.*) alpha.*", r"\1", line) for line in chosen] == shapes
    assert seen["parameters left"] == []


def test_numbers(seen: dict[str, Any]) -> None:
    """One rank, two that share each expert unevenly, and two that share the experts, within the tolerance."""
    assert seen["miss"] == {"tp 1": "", "tp 2": "", "ep 2": ""}


def test_numbers_notice(seen: dict[str, Any]) -> None:
    """Negative control: the first rank's share twice."""
    for miss in seen["wrong ranks"].values():
        assert "errs by" in miss


def test_dummy_weights_are_the_same(seen: dict[str, Any]) -> None:
    """Those that two servers are timed with; negative control: SGLang's own, which hang on the dtype."""
    biases = {f"model.layers.0.mlp.experts.{name}_weight_bias" for name in ("w13", "w2")}
    assert seen["dummies that differ"]["spread"] == []
    assert biases <= {*seen["dummies that differ"]["by SGLang"]}


def test_refused(seen: dict[str, Any]) -> None:
    """Each way to run that is not served, by what SGLang's own configuration says; and none without one."""
    assert seen["nothing refused"] == "nothing"
    assert seen["refused"] == {name: f"Mxfp4Error: {text}" for name, text in REFUSED.items()}


def test_refused_checkpoint(seen: dict[str, Any]) -> None:
    """Another format, a tensor that did not come, and a state that would lack the experts."""
    assert seen["not mxfp4"] == (
        "Mxfp4Error: the checkpoint's quantization must be mxfp4 for VLLM_MXFP4_SGLANG=1; got None. "
        "Serve this checkpoint without VLLM_MXFP4_SGLANG, or use one of GPT-OSS's MXFP4 checkpoints."
    )
    assert seen["a tensor is missing"] == (
        f"Mxfp4Error: {EXPERTS}.down_proj_scales must be in the checkpoint; got nothing for 8 of this rank's "
        "8 experts. Put the whole checkpoint where it is loaded from."
    )
    assert seen["state"].startswith(f"Mxfp4Error: {EXPERTS}.* must be left out of any saved state")


def test_a_wrong_opt_in_ends_the_server(seen: dict[str, Any]) -> None:
    """SGLang logs a plugin's exceptions and goes on with its own method; this one it does not catch."""
    assert seen["wrong value"] == (
        "VLLM_MXFP4_SGLANG: Mxfp4Error: VLLM_MXFP4_SGLANG must be one of 0, 1; got 'yes'. "
        "Set VLLM_MXFP4_SGLANG to one of these or unset it."
    )


def test_an_sglang_that_cannot_be_hooked_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here there is none at all; without the opt-in nothing is looked for."""
    sglang_plugin.register()
    monkeypatch.setenv("VLLM_MXFP4_SGLANG", "1")
    with pytest.raises(SystemExit, match=r"^VLLM_MXFP4_SGLANG: ModuleNotFoundError: .*sglang"):
        sglang_plugin.register()


@pytest.mark.load
@pytest.mark.parametrize("release", ["0.5.16", "0.5.23"])
def test_run_on_a_device(release: str, packages: Path, distribution: Path, tmp_path: Path) -> None:
    """The script for a GPU, on a CPU: whole blocks and timed layers are right; and what cannot run."""
    path = [distribution, packages / f"sglang-{release}"]
    arguments = [str(SUPPORT / "run_in_sglang.py"), "--device", "cpu", "--shape", "4", "2", "96", "96"]
    arguments += ["--tokens", "1", "7", "--json", str(tmp_path / "json")]
    ours = run_python(arguments, path, VLLM_MXFP4_SGLANG="1")
    assert ours.returncode == 0, ours.stdout + ours.stderr
    last = ours.stdout.splitlines()[-1]
    assert last.startswith(f"RIGHT: SGLang {release} with reference on cpu (torch ")
    seen = json.loads((tmp_path / "json").read_text())
    assert [row["tokens"] for row in seen["rows"]] == [1, 7]
    # SGLang's own needs triton_kernels, which is not here.
    theirs = run_python(arguments, path)
    assert theirs.returncode == 1
    assert theirs.stdout.splitlines()[-1].startswith("FAILED: ModuleNotFoundError: No module named 'triton_")


def test_overrides_notice() -> None:
    """Negative control: a method that lacks a parameter, and one that calls it otherwise."""

    class Base:
        def apply(self, layer: object, dispatch_output: object) -> None: ...

    class Fewer(Base):
        def apply(self, layer: object) -> None: ...

    class Renamed(Base):
        def apply(self, layer: object, dispatched: object) -> None: ...

    check_overrides(type("Same", (Base,), {"apply": Base.apply}), Base)
    for ours in (Fewer, Renamed):
        with pytest.raises(TypeError, match=r"apply.* must take \['layer', 'dispatch_output'\]"):
            check_overrides(ours, Base)
