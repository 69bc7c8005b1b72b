"""The vLLM plugin: vLLM calls `register` in every process it starts."""


def register() -> None:
    """Install the seams (entry point of group `vllm.general_plugins`); cheap, repeatable, never raises.

    An exception here would stop every `vllm` command, also those that have nothing to do with steering.
    What could not be installed is remembered and refuses a steered checkpoint later.
    """
    import logging

    try:
        from vllm_steer.serving import patches

        patches.install()
    except Exception:
        logging.getLogger("vllm.steer").exception("vllm-steer is installed but could not start: steering is off")
