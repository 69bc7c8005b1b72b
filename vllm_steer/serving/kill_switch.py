"""The kill switch: an environment variable under which every drafter is served unsteered."""

from __future__ import annotations

import os

from vllm_steer.common.errors import SteeringError

KILL_SWITCH = "STEER_DISABLE"  # without the VLLM_ prefix: vLLM warns about, or refuses, names it does not know
SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def disabled() -> bool:
    """Whether the kill switch is on. The spellings of SWITCH count in any case; an empty value is as good as none.

    Raises SteeringError for any other spelling.
    """
    value = os.environ.get(KILL_SWITCH, "").strip()
    if value and value.lower() not in SWITCH:
        on, off = (", ".join(word for word, means in SWITCH.items() if means is side) for side in (True, False))
        raise SteeringError(
            f"the environment variable {KILL_SWITCH} is {value!r}, allowed are {on} to serve steered drafters "
            f"unsteered, and {off} or nothing to steer them: set one of these, or unset it"
        )
    return SWITCH.get(value.lower(), False)
