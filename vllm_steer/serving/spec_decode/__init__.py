"""The steered drafters of vLLM's two model runners."""
