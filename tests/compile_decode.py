"""Compiles the decode path's matmul for Hopper, without a GPU: tiles on stdin, what came out on stdout."""

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

from vllm_mxfp4_gfx950.backends import decode_kernels
from vllm_mxfp4_gfx950.tuning import TileConfig

POINTERS = {
    "X": "bf16",
    "W": "i32",
    "S": "i16",
    "B": "fp32",
    "Gather": "i32",
    "Weights": "bf16",
    "Starts": "i32",
    "Schedule": "i32",
}


def compiled(tile: TileConfig, *, gated: bool) -> dict[str, Any]:
    """What the compiler made of one tile.

    Returns:
        how many instructions load from or store to local memory, which are spills; and how many are matrix
        instructions of a warp and of a warp group.
    """
    twisted = tile.block_m < 16 or tile.num_warps < 4
    constants = {
        "TOPK": 4, "GATED": gated, "LAYOUT": "hopper", "TWISTED_X": twisted, "TWISTED_Y": gated and twisted,
        "OVERLAP": True, "SPLIT_K": tile.split_k, "BLOCK_T": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }  # fmt: skip
    types = POINTERS | {"Y": "bf16" if gated else "fp32"}
    kernel = decode_kernels.mxfp4_matmul
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
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if tile.waves_per_eu:
        options["maxnreg"] = 512 // tile.waves_per_eu // 8 * 8
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
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
    }


if __name__ == "__main__":
    cases = json.load(sys.stdin)
    json.dump([compiled(TileConfig(*tile), gated=gated) for tile, gated in cases], sys.stdout)
