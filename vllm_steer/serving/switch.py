"""The old name of `vllm_steer.serving.scale`, which `--worker-extension-cls` of existing deployments still gives."""

from __future__ import annotations

import warnings

from vllm_steer.serving.scale import Switch as Switch

warnings.warn(
    "vllm_steer.serving.switch.Switch is now vllm_steer.serving.scale.Switch; the old name goes in the next release",
    FutureWarning,
    stacklevel=2,
)
