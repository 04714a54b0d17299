"""What an entry of the instruction set's tables says: the types of results and operands, and the function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A NumPy array of any shape, or a number that stands for all of its elements."""


@dataclass(frozen=True)
class Op:
    """One instruction's meaning.

    Args:
        results, operands: types: u16 i16 u32 i32 f32 u64 (a register pair), f32x2 (a pair of floats),
            mask (one bit per lane, in a pair of scalar registers), scc (a scalar condition), k16 (a
            constant of 16 bits with a sign, written without it).
        function: takes the operands as arrays and returns the result, or a tuple of them.
        modifiers: names of modifiers of which the function gets the values, as keywords.
    """

    results: tuple[str, ...]
    operands: tuple[str, ...]
    function: Callable[..., Any]
    modifiers: tuple[str, ...] = ()


def op(types: str, function: Callable[..., Any], *modifiers: str) -> Op:
    """An Op from "result result = operand operand"."""
    results, _, operands = types.partition("=")
    return Op(tuple(results.split()), tuple(operands.split()), function, modifiers)


U16, U32, I32, F32 = "u16 = u16 u16", "u32 = u32 u32", "i32 = i32 i32", "f32 = f32 f32"

COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "ne": np.not_equal,
}
