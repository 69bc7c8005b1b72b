"""Training of steering modules and draft models."""
