"""Steered speculative decoding (SD²) for vLLM."""

__version__ = "0.1.0"
