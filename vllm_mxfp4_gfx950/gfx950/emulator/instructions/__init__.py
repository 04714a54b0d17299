"""gfx950's instruction set: a table for each kind of instruction, and the functions that the tables name.

`scalar`, `vector`, `lanes`, `matrix` and `access` have the tables; `decode` asks them. Most entries are one
line, an `Op`: the types of the results and operands, and a function on arrays from `integers`, `floats` or
`small_floats`. Others have a function of their own, which makes of the text (`Form`) what the instruction
does to registers and memory (`Effect`). Where the emulator does otherwise than AMD's manual says, or where
the manual does not say, `deviations` has a row.
"""
