"""Reference decoding loops in plain torch on Hugging Face models."""
