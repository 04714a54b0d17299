"""Measure this package beside vLLM's own MoE backends: one layer, and serving."""
