"""What the DiT is made of: attention whose keys and values can be kept, a block that a condition modulates, its masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.denoisers.transformer import KeysValues, causal_mask, joined, memory_mask

Modulation = tuple[Tensor | None, ...]
"""Shift, scale and gate of the attention, then of the MLP; each (B, 1, W), or (B, T_pred, W) where actions have their own times."""
UNMODULATED: Modulation = (None,) * 6


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


def modulated(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """norm(x), scaled by 1 + scale and shifted: FiLM and adaLN alike; (B, T, W)."""
    return norm(x) if shift is None else torch.addcmul(shift, norm(x), 1 + scale)


def added(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """The residual stream with a branch added, through its gate where there is one."""
    return x + branch if gate is None else torch.addcmul(x, gate, branch)


class Attention(nn.Module):
    """Multi-head attention in parts, so that keys and values of a condition are computed once per chunk and kept.

    Vaswani et al. 2017, arXiv:1706.03762, section 3.2. qk_norm: RMS norm of queries and keys per head, which keeps the
    logits from growing; Henry et al. 2020, arXiv:2010.04245, with the RMS norm of Esser et al. 2024, arXiv:2403.03206.
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dropout: float):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.query_norm = nn.RMSNorm(width // num_heads) if qk_norm else nn.Identity()
        self.key_norm = nn.RMSNorm(width // num_heads) if qk_norm else nn.Identity()

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, W) -> (B, heads, S, W / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Of the tokens x (B, S, W)."""
        keys, values = self.key_value(x).chunk(2, dim=-1)
        return self.key_norm(self.heads(keys)), self.heads(values)

    def forward(self, x: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """Each token of x (B, T, W) looks at S others; mask is True where it may, (T, S) or (B, 1, 1 or T, S)."""
        queries = self.query_norm(self.heads(self.query(x)))
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(queries, *keys_values, attn_mask=mask, dropout_p=dropout)
        return self.out(seen.transpose(1, 2).flatten(-2))

    def weights(self, x: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """How much each token of x (B, T, W) looks at each key (B, heads, S, W / heads): (B, heads, T, S), rows sum to 1."""
        queries = self.query_norm(self.heads(self.query(x)))
        logits = queries @ keys.transpose(-2, -1) / keys.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask, float("-inf"))
        return logits.softmax(dim=-1)


class DitBlock(nn.Module):
    """Attention among actions, attention to a memory on demand, an MLP; each after a norm and around a skip.

    Peebles & Xie 2023, arXiv:2212.09748, Figure 3, the block with adaLN-Zero. Attention to a memory sits between the
    two, unmodulated and with its last layer at 0, as in PixArt-alpha (Chen et al. 2023, arXiv:2310.00426, section 2.3).
    Without modulation it is a plain pre-norm block: that is how a condition's own tokens go through it.
    """

    def __init__(self, width: int, num_heads: int, expansion: int, *, memory: bool, qk_norm: bool, dropout: float):
        super().__init__()
        self.attn = Attention(width, num_heads, qk_norm=qk_norm, dropout=dropout)
        self.memory_attn = Attention(width, num_heads, qk_norm=qk_norm, dropout=dropout) if memory else None
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(approximate="tanh"), nn.Linear(expansion * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def look(self, x: Tensor, modulation: Modulation, mask: Tensor | None, before: KeysValues | None) -> Tensor:
        """The first half: tokens look at each other, and at those `before` them in the sequence, if any."""
        shift, scale, gate = modulation[:3]
        y = modulated(x, shift, scale)
        own = self.attn.keys_values(y)
        return added(x, self.dropout(self.attn(y, own if before is None else joined(before, own), mask)), gate)

    def think(self, x: Tensor, modulation: Modulation) -> Tensor:
        """The MLP."""
        shift, scale, gate = modulation[3:]
        return added(x, self.dropout(self.mlp(modulated(x, shift, scale))), gate)

    def forward(
        self,
        x: Tensor,
        modulation: Modulation,
        mask: Tensor | None,
        kept: KeysValues | None,
        kept_mask: Tensor | None,
    ) -> Tensor:
        """x (B, T, W) -> (B, T, W).

        Args:
            mask: who of x sees whom of [kept, x], or of x alone where a memory is looked at separately.
            kept: keys and values of the condition in this layer: a memory, or what stands before x in one sequence.
            kept_mask: what of a memory may be looked at.
        """
        if self.memory_attn is None:
            x = self.look(x, modulation, mask, kept)
        else:
            x = self.look(x, modulation, mask, None)
            x = x + self.dropout(self.memory_attn(norm(x), kept, kept_mask))
        return self.think(x, modulation)

    def weights(
        self, x: Tensor, modulation: Modulation, mask: Tensor | None, kept: KeysValues, kept_mask: Tensor | None
    ) -> Tensor:
        """How much each token of x looks at each of the S kept ones: (B, heads, T, S). Arguments as for forward."""
        if self.memory_attn is not None:
            x = self.look(x, modulation, mask, None)
            return self.memory_attn.weights(norm(x), kept[0], kept_mask)
        y = modulated(x, *modulation[:2])
        keys = joined(kept, self.attn.keys_values(y))[0]
        return self.attn.weights(y, keys, mask)[..., : kept[0].shape[2]]


def keep_condition(blocks: Sequence[DitBlock], tokens: Tensor, mask: Tensor | None) -> tuple[KeysValues, ...]:
    """The condition's tokens (B, L, W) through all blocks, unmodulated: their keys and values in each.

    They see each other through mask and nobody behind them in the sequence, so that what comes out depends neither on
    the chunk nor on diffusion time. What they become after the last block is never asked for.
    """
    kept = []
    for i, block in enumerate(blocks):
        y = norm(tokens)
        kept.append(block.attn.keys_values(y))
        if i < len(blocks) - 1:
            tokens = block.think(tokens + block.dropout(block.attn(y, kept[-1], mask)), UNMODULATED)
    return tuple(kept)


def may_look_back(pred_horizon: int) -> Tensor:
    """The Transformer's causal mask as claims: action t sees actions s <= t; (T_pred, T_pred) bool."""
    return causal_mask(pred_horizon) == 0


def may_see_frames(pred_horizon: int, frames: tuple[int | None, ...]) -> Tensor:
    """The Transformer's memory mask as claims, less its time token: action t sees frames f <= t; (T_pred, L) bool."""
    return memory_mask(pred_horizon, frames)[:, 1:] == 0


def prefix_mask(kinds: tuple[str, ...]) -> Tensor:
    """Among a condition's tokens, states see all and the others only each other; (L, L) bool.

    sees       words  image  state
    words        1      1      0
    image        1      1      0
    state        1      1      1
    """
    is_state = torch.tensor([kind == "state" for kind in kinds])
    return is_state[:, None] | ~is_state[None, :]


def hide_padding(
    mask: Tensor | None, real: Tensor | None, *, behind: int = 0, keep_self: bool = False
) -> Tensor | None:
    """`mask` (T, L + behind) with padded tokens hidden too, where real (B, L) is False: (B, 1, 1 or T, L + behind).

    Args:
        behind: tokens after the condition's in one sequence, which are always real.
        keep_self: T = L tokens that look at themselves: a padded one still sees itself, so that nobody sees nothing.
    """
    if real is None:
        return mask
    seen = F.pad(real, (0, behind), value=True)[:, None, None, :]  # (B, 1, 1, L + behind)
    if mask is not None:
        seen = seen & mask
    if keep_self:
        seen = seen | torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    return seen
