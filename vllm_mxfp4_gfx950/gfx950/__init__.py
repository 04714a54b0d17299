"""Proof without the hardware: compile for gfx950 anywhere, read what the compiler made, and execute it."""
