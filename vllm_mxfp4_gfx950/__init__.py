"""Serve GPT-OSS from its MXFP4 checkpoint through vLLM on AMD gfx950."""

__version__ = "0.2.0"
