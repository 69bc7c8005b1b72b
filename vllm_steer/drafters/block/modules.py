"""Block drafters in plain torch: DFlash layers, TreeFlash's approximator, Medusa heads.

The names of their parameters are the keys of the published files. The target embeds tokens and reads out logits for
DFlash and TreeFlash; Medusa files have heads of their own.

Shape legend: B rows, T context tokens, A blocks of a row, k drafts, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, rotate_half

from vllm_steer.common.errors import SteeringError
from vllm_steer.drafters.block.config import BlockConfig


class Attention(nn.Module):
    """Queries of the block; keys and values of the context and of the block (DFlash, section 3)."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        c = config.model
        self.head = c.head_dim
        linear = lambda wide, out: nn.Linear(wide, out, bias=c.attention_bias)  # noqa: E731
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * self.head)
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * self.head)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * self.head)
        self.o_proj = linear(c.num_attention_heads * self.head, c.hidden_size)
        self.q_norm, self.k_norm = (Qwen3RMSNorm(self.head, eps=c.rms_norm_eps) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """[B, Q, H] from the block's input [B, Q, H] and the context [B, T, H]; `visible` bool [B, Q, T + Q]."""
        heads = lambda y: y.unflatten(-1, (-1, self.head)).transpose(1, 2)  # noqa: E731
        both = torch.cat([context, x], 1)
        q, k = (norm(heads(y).transpose(1, 2)).transpose(1, 2) for norm, y in
                ((self.q_norm, self.q_proj(x)), (self.k_norm, self.k_proj(both))))  # fmt: skip
        cos, sin = (part[:, None] for part in rope)
        k = k * cos + rotate_half(k) * sin
        cos, sin = (part[:, :, -q.shape[2] :] for part in (cos, sin))
        q = q * cos + rotate_half(q) * sin
        found = nn.functional.scaled_dot_product_attention(
            q, k, heads(self.v_proj(both)), attn_mask=visible[:, None], enable_gqa=True
        )
        return self.o_proj(found.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: BlockConfig):
        super().__init__()
        c = config.model
        self.self_attn = Attention(config)
        self.mlp = Qwen3MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            Qwen3RMSNorm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(2)
        )

    def forward(self, x: Tensor, context: Tensor, rope: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        """As `Attention.forward`."""
        x = x + self.self_attn(self.input_layernorm(x), context, rope, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlash(nn.Module):
    """The newest token and k masks attend to each other and to the target's states before them (arXiv 2602.06036)."""

    def __init__(self, config: BlockConfig):
        """Raises SteeringError for variants that only vLLM serves: windows, causal blocks, attention sinks."""
        super().__init__()
        _refuse_variants(config)
        c = config.model
        self.fc = nn.Linear(len(config.states) * c.hidden_size, c.hidden_size, bias=False)
        self.hidden_norm, self.norm = (Qwen3RMSNorm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(2))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        with torch.device("cpu"):  # also where weights are only shapes yet
            self._rope = [Qwen3RotaryEmbedding(c)]  # in a list: it has no weights, and is not a part of the file

    def hidden(self, embeddings: Tensor, states: Tensor, anchors: Tensor, length: int) -> Tensor:
        """States [B, A, k, H] of the masks of each block, before the final norm.

        Args:
            embeddings: [B, A * (k + 1), H] of the newest token and its masks, block after block.
            states: [B, T, len(config.states) * H] of the target, at positions 0 .. T - 1.
            anchors: int64 [B, A], the position of each block's newest token; it sees the states before it.
            length: k.
        """
        (rows, tokens), blocks, per = states.shape[:2], anchors.shape[1], length + 1
        context = self.hidden_norm(self.fc(states))
        place = torch.arange(tokens, device=anchors.device)
        positions = (anchors[..., None] + torch.arange(per, device=anchors.device)).flatten(1)
        owner = torch.arange(blocks, device=anchors.device).repeat_interleave(per)
        before = place < anchors.repeat_interleave(per, 1)[..., None]
        own = (owner[:, None] == owner).expand(rows, -1, -1)
        rope = self._rope[0].to(anchors.device)(embeddings, torch.cat([place.expand(rows, -1), positions], 1))
        x, visible = embeddings, torch.cat([before, own], -1)
        for layer in self.layers:
            x = layer(x, context, rope, visible)
        return x.unflatten(1, (blocks, per))[:, :, 1:]


class Approximator(nn.Module):
    """What the token before changes in a block's state: a gated MLP on both (TreeFlash, arXiv 2606.03819, section 4).

    It starts at zero, so that an untrained one changes nothing.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.ug = nn.Linear(2 * hidden_size, 2 * intermediate_size)
        self.d = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.norm = Qwen3RMSNorm(hidden_size, eps=1e-6)
        nn.init.zeros_(self.d.weight)

    def forward(self, previous: Tensor, normed: Tensor) -> Tensor:
        """[..., H] to be added to the state before the final norm, from the embedding of the token before [..., H] and
        the state after that norm [..., H]."""
        up, gate = self.ug(torch.cat([self.norm(previous), normed], -1)).chunk(2, -1)
        return self.d(nn.functional.silu(gate) * up)


class ResidualBlock(nn.Module):
    """One Medusa head without its read-out."""

    def __init__(self, hidden_size: int, layers: int, bias: bool):
        super().__init__()
        linears = [nn.Linear(hidden_size, hidden_size, bias=bias) for _ in range(layers)]
        for linear in linears:
            nn.init.zeros_(linear.weight)
        self.layers = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        for layer in self.layers:
            x = x + nn.functional.silu(layer(x))
        return x


class Readout(nn.Module):
    """A weight [V, H] under the name that files have for it."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))


def _refuse_variants(config: BlockConfig) -> None:
    c, dflash = config.model, config.raw.get("dflash_config", {})
    variants = {
        "sliding windows": "sliding_attention" in (c.layer_types or ()) or dflash.get("use_swa"),
        "causal blocks": config.raw.get("is_causal") or dflash.get("causal"),
        "attention sinks": dflash.get("attention_sink_bias") or config.raw.get("add_swa_attention_sink_bias"),
        "scaled values": dflash.get("attention_value_scale"),
        "interleaved rotary embeddings": config.raw.get("is_neox_style") is False,
        "a vocabulary of its own": config.raw.get("draft_vocab_size") not in (None, config.vocab_size),
    }
    for name, there in variants.items():
        if there:
            raise SteeringError(
                f"{config.where}: {name} are vLLM's own: it serves this drafter, but vllm-steer cannot train or "
                "refine it"
            )
