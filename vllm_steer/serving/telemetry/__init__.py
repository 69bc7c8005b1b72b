"""Counting blocks, watching acceptance, exporting metrics."""
