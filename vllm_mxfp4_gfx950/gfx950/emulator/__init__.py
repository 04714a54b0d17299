"""An emulator of gfx950: it executes what Triton compiled, on tensors of the CPU.

In the order of the data: `assembly` reads the compiler's text; `decode` makes of each instruction a function
on registers, with `operands` for what the text names, `arithmetic` for what is computed, `lanes` for what
crosses lanes and `access` for what reaches memory; `waves` holds the registers and `memory` the tensors and
the LDS; `execution` runs workgroups.
"""
