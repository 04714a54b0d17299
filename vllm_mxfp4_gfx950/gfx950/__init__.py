"""Proof without the hardware: compile for gfx950 anywhere, and read what the compiler made."""
