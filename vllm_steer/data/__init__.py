"""Prompts, responses and training rows."""
