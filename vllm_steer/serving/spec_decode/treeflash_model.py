"""TreeFlash (arXiv 2606.03819) as a vLLM model: its DFlash drafter with the approximator of the authors' layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model


class Approximator(nn.Module):
    """As `drafters.block.modules.Approximator`, on every rank whole."""

    def __init__(self, hidden_size: int, intermediate_size: int, dtype: torch.dtype):
        super().__init__()
        given: dict[str, Any] = {"params_dtype": dtype, "return_bias": False}
        self.ug = ReplicatedLinear(2 * hidden_size, 2 * intermediate_size, bias=True, **given)
        self.d = ReplicatedLinear(intermediate_size, hidden_size, bias=False, **given)
        self.norm = RMSNorm(hidden_size, eps=1e-6)

    def forward(self, previous: Tensor, normed: Tensor) -> Tensor:
        """[B, H] to be added, from embeddings [B, H] and normed states [B, H]."""
        up, gate = self.ug(torch.cat([self.norm(previous), normed], -1)).chunk(2, -1)
        return self.d(nn.functional.silu(gate) * up)


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "input_embeds": 0})
class TreeFlashModel(DFlashQwen3Model):
    """Hands out the state before the final norm beside the one after it, as one tensor that runners index as before."""

    def __init__(self, *, vllm_config: Any, start_layer_id: int = 0, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, start_layer_id=start_layer_id, prefix=prefix)
        dtype = vllm_config.speculative_config.draft_model_config.dtype
        self.ar_approximation = Approximator(self.config.hidden_size, self.config.intermediate_size, dtype)

    def forward(self, input_ids: Tensor, positions: Tensor, input_embeds: Tensor | None = None) -> Tensor:
        """[rows, 2H]: the normed state and the state."""
        x = self.embed_input_ids(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(positions=positions, hidden_states=x, residual=residual)
        normed, state = self.norm(x, residual)
        return torch.cat([normed, state], -1)


class TreeFlashForCausalLM(DFlashQwen3ForCausalLM):
    """`TreeFlashDraftModel`, which vLLM calls `DFlashTreeFlashDraftModel`."""

    model_cls = TreeFlashModel

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """As vLLM's, for keys that begin with `model.`."""
        return super().load_weights((name.removeprefix("model."), weight) for name, weight in weights)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Logits [B, V] of normed states [B, H], or of what the model hands out [B, 2H]: those without approximator."""
        return super().compute_logits(hidden_states[..., : self.config.hidden_size].contiguous())

    def step_logits(self, states: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
        """Logits [B, V] of one draft each, from the model's states [B, 2H] and the tokens before [B]; `gate` scalar."""
        normed, state = states.chunk(2, -1)
        model: Any = self.model
        added = model.ar_approximation(model.embed_tokens(previous), normed)
        logits = self.compute_logits(model.norm((state + gate.to(state.dtype) * added).contiguous()))
        assert logits is not None  # every rank has them in a drafter
        return logits
