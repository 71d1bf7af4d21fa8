"""The Transformer denoiser of Diffusion Policy: a causal decoder over actions that looks at time and observations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.denoisers.embedding import check_chunk, check_embedding_dim, sinusoidal_embedding
from diffpolicy.spec import Condition, ConditionSpec

INIT_STD = 0.02
"""Spread of the initial weights, GPT-2's."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Choices of DiffusionTransformer; the defaults are the recipe for Push-T from states."""

    width: int = 256
    """Numbers in one token inside the network."""
    depth: int = 8
    """Decoder layers."""
    num_heads: int = 4
    """Attention heads; must divide width."""
    num_cond_layers: int = 0
    """Self-attention layers over the condition's tokens; 0: an MLP on each token alone."""
    dropout: float = 0.01
    """On attention weights and on each residual branch, in training."""
    embedding_dropout: float = 0.0
    """On tokens as they enter, in training."""
    causal: bool = True
    """Actions see earlier actions, and observations no later than themselves; False: everything sees everything."""

    def __post_init__(self):
        check_embedding_dim("denoiser.width", self.width)
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"denoiser.num_heads must divide denoiser.width = {self.width}, got {self.num_heads}")
        if self.depth < 1:
            raise ValueError(f"denoiser.depth must be at least 1, got {self.depth}")
        if self.num_cond_layers < 0:
            raise ValueError(f"denoiser.num_cond_layers must be at least 0, got {self.num_cond_layers}")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"denoiser.{name} must be in [0, 1), got {getattr(self, name)}")


def causal_mask(pred_horizon: int) -> Tensor:
    """Action t sees actions s <= t, as numbers to add to the attention: 0 may look, -inf may not; (T_pred, T_pred)."""
    may_look = torch.ones(pred_horizon, pred_horizon, dtype=torch.bool).tril()
    return torch.zeros(pred_horizon, pred_horizon).masked_fill(~may_look, float("-inf"))


def memory_mask(pred_horizon: int, frames: tuple[int | None, ...]) -> Tensor:
    """Action t sees the diffusion time, what belongs to no frame, and observed frames f <= t; (T_pred, 1 + L), to be added.

    L = 3     time  frame 0  frame 1  words (no frame)
    action 0    0      0      -inf      0
    action 1    0      0        0       0
    """
    first = torch.tensor([0, *(frame or 0 for frame in frames)])  # (1 + L,); token 0 is the diffusion time
    later = torch.arange(pred_horizon)[:, None] < first[None, :]
    return torch.zeros(pred_horizon, 1 + len(frames)).masked_fill(later, float("-inf"))


def hide_padding(mask: Tensor | None, token_mask: Tensor | None) -> Tensor | None:
    """`mask` (T, 1 + L), to be added to attention, with padded tokens (B, L) hidden too: (B, 1, 1 or T, 1 + L).

    Token 0, the diffusion time, is never padding.
    """
    if token_mask is None:
        return mask
    hidden = F.pad(
        torch.zeros(token_mask.shape, device=token_mask.device).masked_fill(~token_mask, float("-inf")), (1, 0)
    )
    hidden = hidden[:, None, None, :]  # (B, 1, 1, 1 + L)
    return hidden if mask is None else mask + hidden


KeysValues = tuple[Tensor, Tensor]
"""Keys and values of some tokens in one layer, each (B, heads, S, W / heads)."""


def joined(first: KeysValues, second: KeysValues) -> KeysValues:
    """Keys and values of two runs of tokens, side by side."""
    return torch.cat([first[0], second[0]], dim=2), torch.cat([first[1], second[1]], dim=2)


class Attention(nn.Module):
    """Multi-head attention with the parameter names of nn.MultiheadAttention.

    Ours, because PyTorch's Transformer layers look into their masks at run time, which torch.export cannot follow.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def heads(self, x: Tensor) -> Tensor:
        """(B, S, W) -> (B, heads, S, W / heads)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Of the tokens of a memory (B, S, W)."""
        width = memory.shape[-1]
        keys, values = F.linear(memory, self.in_proj_weight[width:], self.in_proj_bias[width:]).chunk(2, dim=-1)
        return self.heads(keys), self.heads(values)

    def forward(self, x: Tensor, memory: Tensor | KeysValues, mask: Tensor | None) -> Tensor:
        """Each token of x (B, T, W) looks at memory (B, S, W), or its keys and values, through mask, (T, S) or (B, 1, T, S)."""
        width = x.shape[-1]
        if x is memory:
            q, k, v = map(self.heads, F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        else:
            q = self.heads(F.linear(x, self.in_proj_weight[:width], self.in_proj_bias[:width]))
            k, v = memory if isinstance(memory, tuple) else self.keys_values(memory)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(out.transpose(1, 2).flatten(-2))


class EncoderLayer(nn.Module):
    """Self-attention, then an MLP, each after its own norm and around a skip."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.linear1 = nn.Linear(config.width, 4 * config.width)
        self.linear2 = nn.Linear(4 * config.width, config.width)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, mask))
        y = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        return x + self.dropout(self.linear2(y))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the condition, then an MLP, each after its own norm and around a skip."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.multihead_attn = Attention(config)
        self.linear1 = nn.Linear(config.width, 4 * config.width)
        self.linear2 = nn.Linear(4 * config.width, config.width)
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.norm3 = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: Tensor | KeysValues, mask: Tensor | None, memory_mask: Tensor | None
    ) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.self_attn(y, y, mask))
        x = x + self.dropout(self.multihead_attn(self.norm2(x), memory, memory_mask))
        y = self.dropout(F.gelu(self.linear1(self.norm3(x))))
        return x + self.dropout(self.linear2(y))


@dataclass(frozen=True)
class PreparedMemory:
    """What a condition contributes to every denoising step of a chunk; DiffusionTransformer.forward takes it in its place."""

    kept: tuple[KeysValues, ...]
    """Keys and values of its L tokens in each decoder layer."""
    token_mask: Tensor | None
    """(B, L) bool, as in Condition."""


class LayerStack(nn.Module):
    """Layers under the key `layers`, where PyTorch's own stacks keep them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *rest: Tensor | None) -> Tensor:
        for layer in self.layers:
            x = layer(x, *rest)
        return x


class DiffusionTransformer(nn.Module):
    """One token per action; diffusion time and observed frames are the tokens it attends to.

    Chi et al. 2023, arXiv:2303.04137, section IV-A. Same numbers, initial spread and state-dict keys as the authors'
    TransformerForDiffusion with time and observations as condition, so that their checkpoints load. The condition's
    tokens are used, its global vector is not.
    """

    def __init__(self, config: TransformerConfig, *, action_dim: int, pred_horizon: int, cond: ConditionSpec):
        super().__init__()
        if cond.num_tokens < 1:
            raise ValueError(
                f"denoiser.name=transformer attends to the encoder's tokens and needs at least 1, "
                f"got {cond.num_tokens}; choose an encoder with tokens or denoiser.name=unet"
            )
        self.action_dim = action_dim
        self.pred_horizon = pred_horizon
        self.width = width = config.width
        self.input_emb = nn.Linear(action_dim, width)
        self.pos_emb = nn.Parameter(torch.empty(1, pred_horizon, width))
        self.cond_obs_emb = nn.Linear(cond.token_dim, width)
        self.cond_pos_emb = nn.Parameter(torch.empty(1, 1 + cond.num_tokens, width))
        self.drop = nn.Dropout(config.embedding_dropout)
        if config.num_cond_layers:
            self.encoder = LayerStack([EncoderLayer(config) for _ in range(config.num_cond_layers)])
        else:
            self.encoder = nn.Sequential(nn.Linear(width, 4 * width), nn.Mish(), nn.Linear(4 * width, width))
        self.decoder = LayerStack([DecoderLayer(config) for _ in range(config.depth)])
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, action_dim)
        # Buffers, as in the reference's checkpoints; None where nothing is masked.
        self.register_buffer("mask", causal_mask(pred_horizon) if config.causal else None)
        hidden = memory_mask(pred_horizon, cond.frames) if config.causal else None
        self.register_buffer("memory_mask", hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights and positions N(0, .02), biases 0; norms keep PyTorch's 1 and 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Attention):
                nn.init.normal_(module.in_proj_weight, std=INIT_STD)
        nn.init.normal_(self.pos_emb, std=INIT_STD)
        nn.init.normal_(self.cond_pos_emb, std=INIT_STD)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: biases, norms and positions, as in the reference."""
        norms = {name for name, module in self.named_modules() if isinstance(module, nn.LayerNorm)}
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith("bias") or name.rpartition(".")[0] in norms or name in ("pos_emb", "cond_pos_emb")
        }

    def prepare(self, condition: Condition) -> Condition | PreparedMemory:
        """Keys and values of the condition's tokens; with num_cond_layers they see diffusion time, so that none can be kept."""
        if isinstance(self.encoder, LayerStack):
            return condition
        memory = self.encoder(self.drop(self.cond_obs_emb(condition.tokens) + self.cond_pos_emb[:, 1:]))  # (B, L, W)
        kept = tuple(layer.multihead_attn.keys_values(memory) for layer in self.decoder.layers)
        return PreparedMemory(kept, condition.token_mask)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | PreparedMemory) -> Tensor:
        """What the network was trained to predict, in the shape of x_t.

        Args:
            x_t: noisy chunk, (B, T_pred, D_act).
            t: network time, (B,).
            condition: its tokens (B, L, D_token) are used, but for those that token_mask hides; or what prepare made of it.
        """
        check_chunk(x_t, t, self.pred_horizon, self.action_dim)
        time_token = sinusoidal_embedding(t.to(x_t.dtype), self.width).unsqueeze(1)  # (B, 1, W)
        if isinstance(condition, PreparedMemory):
            time = self.encoder(self.drop(time_token + self.cond_pos_emb[:, :1]))
            of_time = [layer.multihead_attn.keys_values(time) for layer in self.decoder.layers]
            memories = [joined(first, kept) for first, kept in zip(of_time, condition.kept, strict=True)]
        else:
            tokens = torch.cat([time_token, self.cond_obs_emb(condition.tokens)], dim=1)  # (B, 1+L, W)
            memory = self.drop(tokens + self.cond_pos_emb)
            if isinstance(self.encoder, LayerStack):
                memory = self.encoder(memory, hide_padding(None, condition.token_mask))
            else:
                memory = self.encoder(memory)
            memories = [memory] * len(self.decoder.layers)
        x = self.drop(self.input_emb(x_t) + self.pos_emb)  # (B, T_pred, W)
        memory_mask = hide_padding(self.memory_mask, condition.token_mask)
        for layer, memory in zip(self.decoder.layers, memories, strict=True):
            x = layer(x, memory, self.mask, memory_mask)
        return self.head(self.ln_f(x))  # (B, T_pred, D_act)
