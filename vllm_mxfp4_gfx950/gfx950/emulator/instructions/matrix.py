"""Matrix instructions; TABLE is all of them."""

from __future__ import annotations

import functools

import numpy as np

from vllm_mxfp4_gfx950.gfx950.driver import WAVE
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.op import Array
from vllm_mxfp4_gfx950.gfx950.emulator.instructions.small_floats import E2M1, E8M0, FORMATS
from vllm_mxfp4_gfx950.gfx950.emulator.operands import Effect, Entry, Form, Machine, Operand, Unknown
from vllm_mxfp4_gfx950.gfx950.emulator.waves import Waves


def matrix(form: Form, rows: int, depth: int) -> Effect:
    """D = A B + C on bf16 matrices, for all lanes whatever EXEC says.

    A lane l holds 8 values along k, from k = 8 * (l // rows), of A's row and of B's column l % rows;
    and of D and C, in register r, row 8 * (r // 4) + 4 * (l // rows) + r % 4 of 32 (4 * (l // rows) + r
    of 16), column l % rows.
    """
    form.all_lanes = True
    d, a, b = form.target(), form.source(), form.source()
    c = form.source()
    groups = WAVE // rows

    def operand(waves: Waves, first: int) -> Array:
        raw = waves.v[first : first + 4].reshape(4, len(waves), groups, rows)
        values = np.empty((len(waves), rows, groups, 4, 2), np.float32)
        values[..., 0] = (raw << np.uint32(16)).view(np.float32).transpose(1, 3, 2, 0)
        values[..., 1] = (raw & np.uint32(0xFFFF0000)).view(np.float32).transpose(1, 3, 2, 0)
        return values.reshape(len(waves), rows, depth)

    def effect(waves: Waves, machine: Machine) -> None:
        product = operand(waves, a.register) @ operand(waves, b.register).transpose(0, 2, 1)
        add_matrix(waves, product, d, c)

    return effect


def add_matrix(waves: Waves, product: Array, d: Operand, c: Operand) -> None:
    """D = C + a product [waves, rows, columns], rounded to float32."""
    count, _, columns = product.shape
    parts = product.reshape(count, d.count // 4, WAVE // columns, 4, columns).transpose(1, 3, 0, 2, 4)
    out = parts.reshape(d.count, count, WAVE)
    if c.kind == "v":
        out = out + waves.v[c.register : c.register + c.count].view(np.float32)
    elif c.constant != "0":
        raise Unknown(f"a matrix of {c.constant} is not something the emulator knows")
    waves.v[d.register : d.register + d.count] = out.astype(np.float32, copy=False).view(np.uint32)
    for register in d.registers:
        if not waves.v_all[register]:
            waves.v_known[register] = ~np.uint64(0)
            waves.v_all[register] = True


def scaled_matrix(form: Form, rows: int) -> Effect:
    """D = A B + C on matrices of 4 or 8 bits, each 32 values along k times a power of two, for all lanes.

    A lane l holds 32 values of A's row and of B's column l % rows: of 4 bits those from k = 32 * (l // rows)
    on; of 8 bits 16 from k = 16 * (l // rows) on, and the same of the second half of k. It holds the scale of
    the 32 values from k = 32 * (l // rows) on of the same row or column, in the byte of a register that
    op_sel (its low bit) and op_sel_hi (its high one) choose. D and C are as in `matrix`.

    The sum over k is exact here, and rounded once, with C. What the hardware does inside is not published.

    Source: AMD, "CDNA4" Instruction Set Architecture reference guide, and Triton's layouts of the operands
    (test/TritonGPU/amd/accelerate-amd-matmul-mfma-gfx950.mlir). A scale in a scalar register or a constant is
    read from other bits by the hardware (LLVM pull request 158117), and refused.
    """
    form.all_lanes = True
    d, a, b, c = form.target(), form.source(), form.source(), form.source()
    scales = form.source(), form.source()
    formats = form.number("cbsz"), form.number("blgp")
    low, high = (
        form.modifiers.pop(name, default) for name, default in (("op_sel", "[0,0,0]"), ("op_sel_hi", ""))
    )
    chosen = [int(x) + 2 * int(y) for x, y in zip(low[1:-1].split(","), high[1:-1].split(","), strict=True)]
    groups = WAVE // rows
    for operand, kind, scale in zip((a, b), formats, scales, strict=True):
        if kind not in FORMATS or operand.count != (4 if kind == E2M1 else 8) or scale.kind != "v":
            raise Unknown("a matrix of this format is not something the emulator knows")

    def values(waves: Waves, which: int) -> Array:
        operand, kind = (a, b)[which], formats[which]
        raw = waves.v[operand.register : operand.register + operand.count]
        codes = raw.view(np.uint8).reshape(-1, 4, len(waves), groups, rows, 4)
        found = FORMATS[kind][codes]  # [half, register, wave, group, row, byte, value]
        found = found.transpose(2, 4, 0, 3, 1, 5, 6).reshape(len(waves), rows, groups, 32)
        scale = waves.v[scales[which].register] >> np.uint32(8 * chosen[which]) & np.uint32(255)
        power = E8M0[scale].reshape(len(waves), groups, rows, 1).transpose(0, 2, 1, 3)
        return (found * power).reshape(len(waves), rows, 32 * groups)

    def effect(waves: Waves, machine: Machine) -> None:
        add_matrix(waves, values(waves, 0) @ values(waves, 1).transpose(0, 2, 1), d, c)

    return effect


TABLE: dict[str, Entry] = {
    "v_mfma_f32_16x16x32_bf16": ("matrix", functools.partial(matrix, rows=16, depth=32)),
    "v_mfma_f32_32x32x16_bf16": ("matrix", functools.partial(matrix, rows=32, depth=16)),
    "v_mfma_scale_f32_16x16x128_f8f6f4": ("matrix", functools.partial(scaled_matrix, rows=16)),
    "v_mfma_scale_f32_32x32x64_f8f6f4": ("matrix", functools.partial(scaled_matrix, rows=32)),
}
