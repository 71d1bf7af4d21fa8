"""The 1-D U-Net over time with FiLM conditioning: Diffusion Policy's convolutional denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.denoisers.embedding import SinusoidalEmbedding, check_chunk, check_embedding_dim
from diffpolicy.spec import Condition, ConditionSpec

FINAL_GROUPS = 8
"""Groups of the last convolution's norm: the reference leaves them at 8 whatever n_groups says."""


@dataclass(frozen=True, kw_only=True)
class UnetConfig:
    """Choices of ConditionalUnet1d; the defaults are the recipe for Push-T from states."""

    down_dims: tuple[int, ...] = (256, 512, 1024)
    """Channels per level; every level after the first halves the time axis."""
    kernel_size: int = 5
    """Width of a convolution over time; odd."""
    n_groups: int = 8
    """Groups of each group norm; must divide every entry of down_dims."""
    diffusion_step_embed_dim: int = 256
    """Width of the diffusion time's embedding; even."""
    cond_predict_scale: bool = True
    """FiLM with scale and bias; False: bias only."""

    def __post_init__(self):
        object.__setattr__(self, "down_dims", tuple(self.down_dims))
        if not self.down_dims:
            raise ValueError("denoiser.down_dims must name at least one level, got ()")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(
                "denoiser.kernel_size must be odd (an even one changes the length of the chunk), "
                f"got {self.kernel_size}"
            )
        if self.n_groups < 1 or any(dim < 1 or dim % self.n_groups for dim in self.down_dims):
            raise ValueError(
                f"denoiser.n_groups must divide every entry of denoiser.down_dims={self.down_dims}, got {self.n_groups}"
            )
        if self.down_dims[0] % FINAL_GROUPS:
            raise ValueError(
                f"denoiser.down_dims[0] must be a multiple of {FINAL_GROUPS} (groups of the last norm), "
                f"got {self.down_dims[0]}"
            )
        check_embedding_dim("denoiser.diffusion_step_embed_dim", self.diffusion_step_embed_dim)


class ConvBlock(nn.Module):
    """Convolution over time, group norm, Mish: (B, C_in, T) -> (B, C_out, T)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, n_groups: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(n_groups, out_channels),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class FilmResidualBlock(nn.Module):
    """Two convolution blocks with a FiLM between them and a skip around both.

    Perez et al. 2018, arXiv:1709.07871, Eq. 2: gamma * x + beta, both read off the condition.
    """

    def __init__(self, in_channels: int, out_channels: int, film_dim: int, config: UnetConfig):
        super().__init__()
        self.predict_scale = config.cond_predict_scale
        kernel_size, n_groups = config.kernel_size, config.n_groups
        self.blocks = nn.ModuleList(
            [
                ConvBlock(in_channels, out_channels, kernel_size, n_groups),
                ConvBlock(out_channels, out_channels, kernel_size, n_groups),
            ]
        )
        film_channels = 2 * out_channels if self.predict_scale else out_channels
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(film_dim, film_channels))
        same = in_channels == out_channels
        self.residual_conv = nn.Identity() if same else nn.Conv1d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x (B, C_in, T), film (B, D_film) -> (B, C_out, T)."""
        out = self.blocks[0](x)
        embed = self.cond_encoder(film).unsqueeze(-1)  # (B, 2*C_out, 1)
        if self.predict_scale:
            scale, bias = embed.chunk(2, dim=1)  # scale first: the order of the reference's checkpoints
            out = scale * out + bias
        else:
            out = out + embed
        return self.blocks[1](out) + self.residual_conv(x)


class Downsample(nn.Module):
    """Halves the time axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size=3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles the time axis."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.ConvTranspose1d(channels, channels, kernel_size=4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConditionalUnet1d(nn.Module):
    """Actions as channels, time as the axis, diffusion time and observations as FiLM.

    Chi et al. 2023, arXiv:2303.04137, section IV-A. Same numbers and state-dict keys as the authors' ConditionalUnet1D,
    so that their checkpoints load. The condition's global vector is used, its tokens are not.

        x_t --> down 0 (T) --> down 1 (T/2) --> down 2 (T/4) --> mid, mid --> up 0 (T/4 to T/2) --> up 1 (T/2 to T)
                                    |                |                          |                     |
                                    |                +---------- skip ----------+                     |
                                    +--------------------------- skip --------------------------------+

    There is no skip from level 0: the reference stores one more than it reads, and its weights leave no room for it.

    Any T_pred works: a chunk that does not divide by 2^(levels - 1) is padded inside by repeating its last action, and
    the result is cropped; where it divides, this is the reference's network exactly.
    """

    looks_at_tokens = False

    def __init__(self, config: UnetConfig, *, action_dim: int, pred_horizon: int, cond: ConditionSpec):
        super().__init__()
        self.action_dim = action_dim
        self.pred_horizon = pred_horizon
        dims = config.down_dims
        embed_dim = config.diffusion_step_embed_dim
        film_dim = embed_dim + cond.global_dim
        self.time_multiple = 2 ** (len(dims) - 1)

        def block(in_channels: int, out_channels: int) -> FilmResidualBlock:
            return FilmResidualBlock(in_channels, out_channels, film_dim, config)

        self.diffusion_step_encoder = nn.Sequential(
            SinusoidalEmbedding(embed_dim),
            nn.Linear(embed_dim, embed_dim * 4),
            nn.Mish(),
            nn.Linear(embed_dim * 4, embed_dim),
        )
        self.mid_modules = nn.ModuleList([block(dims[-1], dims[-1]), block(dims[-1], dims[-1])])
        self.down_modules = nn.ModuleList()
        for level, (dim_in, dim_out) in enumerate(zip((action_dim, *dims), dims, strict=False)):
            last = level == len(dims) - 1
            down = nn.Identity() if last else Downsample(dim_out)
            self.down_modules.append(nn.ModuleList([block(dim_in, dim_out), block(dim_out, dim_out), down]))
        self.up_modules = nn.ModuleList()
        for dim_in, dim_out in zip(dims[:0:-1], dims[-2::-1], strict=True):  # (1024, 512), (512, 256)
            # twice dim_in: what comes up and the skip lie side by side
            self.up_modules.append(
                nn.ModuleList([block(2 * dim_in, dim_out), block(dim_out, dim_out), Upsample(dim_out)])
            )
        self.final_conv = nn.Sequential(
            ConvBlock(dims[0], dims[0], config.kernel_size, FINAL_GROUPS), nn.Conv1d(dims[0], action_dim, 1)
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: none, as the reference decays all of them."""
        return set()

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """What the network was trained to predict, in the shape of x_t.

        Args:
            x_t: noisy chunk, (B, T, D_act); T need not be the T_pred of the training.
            t: network time, (B,).
            condition: its global_cond (B, D_cond) is used.
        """
        check_chunk(x_t, t, x_t.shape[1], self.action_dim)
        pred_horizon = x_t.shape[1]
        film = torch.cat([self.diffusion_step_encoder(t.to(x_t.dtype)), condition.global_cond], dim=-1)
        x = x_t.transpose(1, 2)  # (B, D_act, T)
        missing = -pred_horizon % self.time_multiple
        if missing:
            x = F.pad(x, (0, missing), mode="replicate")
        skips = []
        for first, second, down in self.down_modules:
            x = second(first(x, film), film)  # (B, C, T / 2**level)
            skips.append(x)
            x = down(x)
        for block in self.mid_modules:
            x = block(x, film)
        for first, second, up in self.up_modules:
            x = torch.cat([x, skips.pop()], dim=1)
            x = up(second(first(x, film), film))
        return self.final_conv(x)[..., :pred_horizon].transpose(1, 2)  # (B, T, D_act)
