"""Steered draft models (SD²): configuration, mathematics, checkpoint format, Hugging Face model."""
