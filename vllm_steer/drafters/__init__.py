"""What a draft model is: on disk, and as a Hugging Face model."""
