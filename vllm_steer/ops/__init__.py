"""Operating a server: launch it, check it, publish a checkpoint."""
