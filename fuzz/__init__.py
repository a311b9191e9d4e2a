"""Mutated bytes by the million, decoded by the compiled kernels and judged by their plain twins (`python -m fuzz`)."""
