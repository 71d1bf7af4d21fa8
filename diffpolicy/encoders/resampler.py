"""Many patches -> few numbers: learned queries that look at the patches of one picture, or places where learned things are.

    patches (N, P, W) -- Linear --> (N, P, D) --+-- attention_pool: K queries, one look ---------------> tokens (N, K, D)
                                                +-- perceiver: K latents, `depth` looks with an MLP each -> tokens (N, K, D)
    patches (N, P, W) -- K maps, softmax over P --> mean place of each: keypoints (N, K, 2)

A ViT's patches carry their position from its first layer on, so that none is added here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD_DIM = 64
"""Width of an attention head, where the tokens' width is a multiple of it; a narrower or odd one has a single head."""
QUERY_STD = 0.02
"""Spread of the queries at the start, GPT-2's."""
MLP_RATIO = 4
SHARPNESS = 3.0
"""Spread of a keypoint's logits over the patches at the start: a few patches win, and where they are already matters."""


class LookAt(nn.Module):
    """Cross-attention: what each query finds in a context, (N, K, D) and (N, L, D) -> (N, K, D)."""

    def __init__(self, dim: int):
        super().__init__()
        self.num_heads = dim // HEAD_DIM if dim % HEAD_DIM == 0 else 1
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, context: Tensor) -> Tensor:
        heads = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, ..., D / heads)
        key, value = self.key_value(context).chunk(2, dim=-1)
        found = F.scaled_dot_product_attention(heads(self.query(queries)), heads(key), heads(value))
        return self.out(found.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """K learned queries that look at the patches once.

    Lee et al. 2019, arXiv:1810.00825, Eq. 10 (pooling by multihead attention) without its MLP, as the attentional pooler
    of CoCa (Yu et al. 2022, arXiv:2205.01917).
    """

    def __init__(self, in_dim: int, *, num_tokens: int, dim: int):
        super().__init__()
        self.project, self.norm = nn.Linear(in_dim, dim), nn.LayerNorm(dim)
        self.queries = nn.Parameter(QUERY_STD * torch.randn(num_tokens, dim))
        self.look, self.out_norm = LookAt(dim), nn.LayerNorm(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, in_dim) -> (N, K, dim)"""
        context = self.norm(self.project(patches))
        queries = self.queries.expand(len(patches), -1, -1)
        return self.out_norm(queries + self.look(queries, context))


class PerceiverLayer(nn.Module):
    """Latents look at the patches and at themselves, then pass an MLP."""

    def __init__(self, dim: int):
        super().__init__()
        self.patch_norm, self.latent_norm, self.mlp_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.look = LookAt(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, MLP_RATIO * dim), nn.GELU(), nn.Linear(MLP_RATIO * dim, dim))

    def forward(self, latents: Tensor, patches: Tensor) -> Tensor:
        normed = self.latent_norm(latents)
        latents = latents + self.look(normed, torch.cat([self.patch_norm(patches), normed], dim=1))
        return latents + self.mlp(self.mlp_norm(latents))


class PerceiverResampler(nn.Module):
    """K learned latents that look at the patches in several layers.

    Alayrac et al. 2022, arXiv:2204.14198, section 3.1.1 and Figure 5. Where we differ: each frame of each camera is resampled
    by itself, so that there are no time embeddings (the condition says which frame a token is of), and the patches are
    brought to the width of the tokens first, which makes the layers as narrow as the denoiser's.
    """

    def __init__(self, in_dim: int, *, num_tokens: int, dim: int, depth: int):
        super().__init__()
        self.project = nn.Linear(in_dim, dim)
        self.latents = nn.Parameter(QUERY_STD * torch.randn(num_tokens, dim))
        self.layers = nn.ModuleList([PerceiverLayer(dim) for _ in range(depth)])
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, in_dim) -> (N, K, dim)"""
        patches = self.project(patches)
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches)
        return self.out_norm(latents)


class Keypoints(nn.Module):
    """Where in the picture each of K learned things is: the mean place of the patches under a softmax map.

    Spatial softmax of Levine et al. 2016, arXiv:1504.00702, section 5.1, over a ViT's patches in place of a convolution's
    pixels. A place is read off directly, where pooling has to learn how positions are written.
    """

    def __init__(self, in_dim: int, *, num_patches: int, num_keypoints: int):
        super().__init__()
        side = round(num_patches**0.5)
        assert side * side == num_patches, num_patches  # towers see squares
        self.maps = nn.Linear(in_dim, num_keypoints)
        nn.init.normal_(self.maps.weight, std=in_dim**-0.5)  # patches come from a norm: logits of spread 1
        nn.init.zeros_(self.maps.bias)
        ends = torch.linspace(-1, 1, side)
        rows, columns = torch.meshgrid(ends, ends, indexing="ij")
        self.register_buffer("places", torch.stack([columns, rows], dim=-1).flatten(0, 1), persistent=False)  # (P, 2)

    def forward(self, patches: Tensor) -> Tensor:
        """(N, P, in_dim) -> (N, K, 2): columns and rows, -1 at the left and at the top, 1 at the right and at the bottom."""
        weights = (SHARPNESS * self.maps(patches)).softmax(dim=1)  # (N, P, K)
        return weights.transpose(1, 2) @ self.places.to(weights.dtype)
