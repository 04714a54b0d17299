"""Compiles our own kernels for Hopper, without a GPU: tiles on stdin, what came out on stdout."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_mxfp4_gfx950.backends.triton import own, own_kernels, routing_kernels
from vllm_mxfp4_gfx950.tiles import TileConfig

POINTERS = {
    "X": "bf16", "W": "i32", "S": "u8", "B": "fp32", "Weights": "bf16", "Logits": "bf16",
    "Gather": "i32", "Scatter": "i32", "Count": "i32", "Counts": "i32", "Starts": "i32", "Schedule": "i32",
    "Parts": "fp32", "Out": "bf16",
}  # fmt: skip
ROUTING = {"Order": None, "TOPK": 4, "BLOCK_TOKENS": 16, "BLOCK_EXPERTS": 32}
PLACES = ROUTING | {"SLOTS": 4, "SMALLEST": 8, "SIZES": 1}
LAUNCHES: dict[str, dict[str, Any]] = {
    "few": PLACES | {"BLOCK_TOKENS": 8, "BLOCK_TILES": 32},
    "count": ROUTING,
    "add_up": {"BLOCK_EXPERTS": 32, "BLOCK_ROWS": 512, "BLOCK_COLUMNS": 2},
    "place": PLACES | {"FEW_BLOCKS": 32, "SUMMED": False, "BLOCK_TILES": 16, "BLOCK_EMPTY": 512},
    "mxfp4_matmul": {
        "TOPK": 4, "GATED": False, "CODES": False, "SPLIT_K": 1, "BLOCK_T": 8, "BLOCK_N": 64,
        "BLOCK_K": 256, "STAGES": 3, "WARPS": 4,
    },
    "combine": {"TOPK": 4, "SPLITS": 2, "BLOCK": 512},
}  # fmt: skip
"""Every kernel that may begin, and wait, while the one before it runs, and its constants."""


def hopper(kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: Any) -> Any:
    """A compiled kernel."""
    signature, aligned = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = (
            f"*{types[name]}" if name in types else "fp32" if name in ("alpha", "limit") else "i32"
        )
        if signature[name] != "fp32":
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def compiled(tile: TileConfig, *, gated: bool) -> dict[str, Any]:
    """What the compiler made of one tile.

    Returns:
        how many instructions load from or store to local memory, which are spills; how many are matrix
        instructions of a warp and of a warp group; and how many groups of those a wait leaves running.
    """
    codes = own.scales_codes(tile)
    constants = {
        "TOPK": 4, "GATED": gated, "CODES": codes, "OVERLAP": True, "SPLIT_K": tile.split_k,
        "BLOCK_T": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages, "WARPS": tile.num_warps,
    }  # fmt: skip
    options = {"num_warps": tile.num_warps}
    if tile.waves_per_eu:
        options["maxnreg"] = 512 // tile.waves_per_eu // 8 * 8
    types = POINTERS | {"Y": "bf16" if gated else "fp32"}
    if codes:
        types["S"] = "i16"
    made = hopper(own_kernels.mxfp4_matmul, constants, types, **options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tools / "nvdisasm"), "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "warp": len(re.findall(r"\bHMMA\.", code)),
        "group": len(re.findall(r"\bHGMMA\.", code)),
        "running": [int(left, 16) for left in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", code)],
    }


def waits(name: str, *, overlaps: bool) -> bool:
    """Whether a kernel waits for the one before it, then lets in the one behind, then reads and writes."""
    kernel = getattr(routing_kernels, name, None) or getattr(own_kernels, name)
    constants = LAUNCHES[name] | {"OVERLAP": overlaps}
    text = hopper(kernel, constants, POINTERS | {"Y": "fp32"}, num_warps=4).asm["ptx"]
    steps = r"griddepcontrol\.\w+|\b(?:ld|st|atom|red)\.global|\bcp\.async"
    return re.findall(steps, text)[:2] == ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]


if __name__ == "__main__":
    tiles = [compiled(TileConfig(*tile), gated=gated) for tile, gated in json.load(sys.stdin)]
    found = {name: [waits(name, overlaps=overlaps) for overlaps in (True, False)] for name in LAUNCHES}
    json.dump({"tiles": tiles, "waits": found}, sys.stdout)
