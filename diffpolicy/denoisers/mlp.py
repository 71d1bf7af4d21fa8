"""A residual MLP over the flattened chunk: small tasks, trained on a CPU in minutes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.denoisers.embedding import check_chunk, check_embedding_dim, sinusoidal_embedding
from diffpolicy.spec import Condition, ConditionSpec


@dataclass(frozen=True, kw_only=True)
class MlpConfig:
    """Choices of MlpDenoiser; the defaults give 4.4 M parameters on Push-T from keypoints."""

    width: int = 512
    """Numbers in the residual stream."""
    depth: int = 3
    """Residual blocks."""
    expansion: int = 2
    """Hidden width of a block over width."""
    embed_dim: int = 96
    """Width of the embeddings of diffusion time and of the condition; even."""

    def __post_init__(self):
        for name in ("width", "depth", "expansion"):
            if getattr(self, name) < 1:
                raise ValueError(f"denoiser.{name} must be at least 1, got {getattr(self, name)}")
        check_embedding_dim("denoiser.embed_dim", self.embed_dim)


@dataclass(frozen=True)
class PreparedShares:
    """What a condition contributes to every denoising step of a chunk; MlpDenoiser.forward takes it in its place."""

    stem: Tensor
    """(B, W)"""
    modulation: Tensor
    """(B, (3 * depth + 2) * W)"""


class ModulatedBlock(nn.Module):
    """Norm, shift and scale, two layers, gate, around a skip."""

    def __init__(self, config: MlpConfig):
        super().__init__()
        self.linear1 = nn.Linear(config.width, config.expansion * config.width)
        self.linear2 = nn.Linear(config.expansion * config.width, config.width)

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        """All of shape (B, W)."""
        y = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
        return torch.addcmul(x, gate, self.linear2(F.silu(self.linear1(y))))


class MlpDenoiser(nn.Module):
    """The chunk as one vector through residual blocks that diffusion time and observations modulate.

    adaLN-Zero of Peebles & Xie 2023, arXiv:2212.09748, section 3.2: shifts, scales, gates and the head start at 0, so
    that every block starts as the identity and the network predicts 0. Where we differ: the condition also enters at
    the stem. The condition's global vector is used, its tokens are not.

    The condition enters in two linear layers only, `stem` and `modulation`, both over a concatenation. So each splits
    into a part of the condition, the same for all denoising steps of a chunk (`prepare`), and a part of (x_t, t).
    """

    looks_at_tokens = False

    def __init__(self, config: MlpConfig, *, action_dim: int, pred_horizon: int, cond: ConditionSpec):
        super().__init__()
        self.action_dim = action_dim
        self.pred_horizon = pred_horizon
        self.embed_dim = embed_dim = config.embed_dim
        width, chunk_dim = config.width, pred_horizon * action_dim
        self.time_encoder = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim))
        self.cond_encoder = nn.Sequential(nn.Linear(cond.global_dim, width), nn.SiLU(), nn.Linear(width, embed_dim))
        self.stem = nn.Linear(chunk_dim + embed_dim, width)
        self.num_modulations = 3 * config.depth + 2
        self.modulation = nn.Linear(2 * embed_dim, self.num_modulations * width)
        self.blocks = nn.ModuleList([ModulatedBlock(config) for _ in range(config.depth)])
        self.head = nn.Linear(width, chunk_dim)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: the biases."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias")}

    def prepare(self, condition: Condition) -> PreparedShares:
        """What the condition adds to the two linear layers it enters, biases included."""
        cond = self.cond_encoder(condition.global_cond)  # (B, E)
        stem, modulation = self.stem, self.modulation
        return PreparedShares(
            stem=F.linear(cond, stem.weight[:, -self.embed_dim :], stem.bias),
            modulation=F.linear(F.silu(cond), modulation.weight[:, self.embed_dim :], modulation.bias),
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | PreparedShares) -> Tensor:
        """What the network was trained to predict, in the shape of x_t.

        Args:
            x_t: noisy chunk, (B, T_pred, D_act).
            t: network time, (B,).
            condition: its global_cond (B, D_cond) is used; or what prepare made of it.
        """
        check_chunk(x_t, t, self.pred_horizon, self.action_dim)
        time = self.time_encoder(sinusoidal_embedding(t.to(x_t.dtype), self.embed_dim))  # (B, E)
        if isinstance(condition, PreparedShares):
            x = torch.addmm(condition.stem, x_t.flatten(1), self.stem.weight[:, : -self.embed_dim].T)
            of_time = self.modulation.weight[:, : self.embed_dim]
            modulation = torch.addmm(condition.modulation, F.silu(time), of_time.T)
        else:  # in one piece, which is faster where gradients are wanted
            cond = self.cond_encoder(condition.global_cond)  # (B, E)
            x = self.stem(torch.cat([x_t.flatten(1), cond], dim=-1))  # (B, W)
            modulation = self.modulation(F.silu(torch.cat([time, cond], dim=-1)))
        *per_block, shift, scale = modulation.chunk(self.num_modulations, dim=-1)  # each (B, W)
        for i, block in enumerate(self.blocks):
            x = block(x, *per_block[3 * i : 3 * i + 3])
        x = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)
        return self.head(x).view_as(x_t)
