"""Measuring draft models in vLLM."""
