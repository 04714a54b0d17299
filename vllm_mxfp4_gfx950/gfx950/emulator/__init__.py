"""An emulator of gfx950: it executes what Triton compiled, on tensors of the CPU.

In the order of the data: `assembly` reads the compiler's text; `instructions` has the instruction set, a
table for each kind, and `decode` makes of each line a function on registers, with `operands` for what the
text names; `load` cuts a kernel into blocks; `launch` lays out its arguments and starts its waves;
`execution` runs them. `waves` holds the registers, `memory` the tensors and the LDS.
"""
