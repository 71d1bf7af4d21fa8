"""A diffusion Transformer over actions, with one switch for how observations and words reach them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.denoisers.dit_blocks import (
    UNMODULATED,
    DitBlock,
    Modulation,
    hide_padding,
    keep_condition,
    may_look_back,
    may_see_frames,
    modulated,
    norm,
    prefix_mask,
)
from diffpolicy.denoisers.embedding import check_chunk, check_embedding_dim, sinusoidal_embedding
from diffpolicy.denoisers.transformer import KeysValues
from diffpolicy.spec import Condition, ConditionSpec, unknown_name

FUSIONS = ("film", "adaln", "cross_attention", "unified", "readout")
TOKEN_FUSIONS = ("cross_attention", "unified", "readout")
"""Those that look at the condition's tokens."""
EMBEDDING_STD = 0.02
"""Spread of positions, kinds, frames and readouts at the start, GPT-2's."""


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Choices of Dit; the defaults are made for a GPU."""

    fusion: str = "adaln"
    """How the condition reaches the actions: film, adaln, cross_attention, unified or readout; Dit describes them."""
    width: int = 512
    """Numbers in one token inside the network."""
    depth: int = 6
    """Blocks."""
    num_heads: int = 8
    """Attention heads; must divide width."""
    expansion: int = 4
    """Hidden width of a block's MLP over width."""
    embed_dim: int = 256
    """Width of the embeddings of diffusion time and of the condition's vector; even."""
    global_vector: bool = False
    """cross_attention, unified: the global vector modulates as well, as in adaln."""
    num_readouts: int = 4
    """readout: learned tokens that gather the condition."""
    readout_depth: int = 2
    """readout: blocks in which they do."""
    qk_norm: bool = False
    """RMS norm of queries and keys."""
    causal: bool = False
    """Actions see earlier actions, and look at tokens of no later frame than themselves; False: at everything.

    What reaches them as a vector comes from all frames, and in unified tokens of the prefix have seen each other.
    """
    dropout: float = 0.0
    """On attention weights and on each residual branch, in training."""

    def __post_init__(self):
        if self.fusion not in FUSIONS:
            raise unknown_name("denoiser.fusion", self.fusion, FUSIONS)
        for name in ("width", "depth", "expansion", "num_readouts", "readout_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"denoiser.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(f"denoiser.num_heads must divide denoiser.width = {self.width}, got {self.num_heads}")
        check_embedding_dim("denoiser.embed_dim", self.embed_dim)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"denoiser.dropout must be in [0, 1), got {self.dropout}")
        for name, default, fusions in (
            ("global_vector", False, ("cross_attention", "unified")),
            ("num_readouts", 4, ("readout",)),
            ("readout_depth", 2, ("readout",)),
        ):
            if getattr(self, name) != default and self.fusion not in fusions:
                warnings.warn(
                    f"denoiser.{name} is ignored: denoiser.fusion={self.fusion} does not use it, {' and '.join(fusions)} would",
                    stacklevel=3,
                )


@dataclass(frozen=True)
class PreparedCondition:
    """What a condition contributes to every denoising step of a chunk; Dit.forward takes it in the condition's place."""

    modulation: Tensor | None
    """(B, 1, N): the condition's share of all shifts, scales and gates; None where only diffusion time modulates."""
    kept: tuple[KeysValues | None, ...]
    """Keys and values of its L tokens in each block; None where actions do not look at them."""
    mask: Tensor | None
    """Who sees whom in a block's first attention, (T, S) or (B, 1, T, S) bool; None: all see all."""
    kept_mask: Tensor | None
    """Which kept tokens an action may look at in attention of its own to them, as mask."""


class Dit(nn.Module):
    """One token per action, blocks that diffusion time modulates, and a choice of how the condition comes in.

    Peebles & Xie 2023, arXiv:2212.09748: adaLN-Zero, where shift, scale and gate of every block and the head start at 0,
    so that each block starts as the identity and the network predicts 0. Where we differ: positions are learned, and the
    modulation reads Linear(SiLU([time, c])), which is a part of time and a part of the condition vector c, added up.

        fusion            the condition's                reaches the actions as
        film              global vector c                scale and shift, no gates, nothing starts at 0: the U-Net's way
                                                         (Perez et al. 2018, arXiv:1709.07871, Eq. 2, gamma about 1)
        adaln             global vector c                shift, scale and gate
        cross_attention   tokens (and c, on demand)      a memory that actions attend to in every block
        unified           tokens (and c, on demand)      the front of one sequence: prefix, states, actions
        readout           tokens                         c = learned readout tokens after blocks of their own, then adaln
                                                         (Octo Model Team 2024, arXiv:2405.12213, section III-A)

    Who sees whom in the one sequence; the blocks as in pi0 (Black et al. 2024, arXiv:2410.24164, appendix B):

        row sees      prefix  state  actions      prefix: tokens of every kind but `state`
        prefix          1       0       0         Attention and MLP are the same layers for all; only actions are
        state           1       1       0         modulated, the condition's tokens have norms that know no time.
        actions         1       1       1

    Readout tokens see the condition's tokens and each other, nobody sees them; they take the place of actions above.
    Tokens are told apart by learned embeddings of their kind and frame; padding (token_mask) is seen by nobody.
    """

    def __init__(self, config: DitConfig, *, action_dim: int, pred_horizon: int, cond: ConditionSpec):
        super().__init__()
        self.fusion = fusion = config.fusion
        if fusion in TOKEN_FUSIONS and cond.num_tokens < 1:
            raise ValueError(
                f"denoiser.fusion={fusion} looks at the encoder's tokens and needs at least 1, got {cond.num_tokens}; "
                "choose an encoder with tokens (encoder.name=clip with encoder.image=patch_tokens gives patches of each "
                "camera) or denoiser.fusion=adaln"
            )
        self.looks_at_tokens = fusion in TOKEN_FUSIONS
        self.action_dim, self.pred_horizon = action_dim, pred_horizon
        self.embed_dim, width = config.embed_dim, config.width
        choices = {"qk_norm": config.qk_norm, "dropout": config.dropout}

        def blocks(number: int, memory: bool) -> nn.ModuleList:
            shape = (width, config.num_heads, config.expansion)
            return nn.ModuleList([DitBlock(*shape, memory=memory, **choices) for _ in range(number)])

        self.action_embedding = nn.Linear(action_dim, width)
        self.positions = nn.Parameter(EMBEDDING_STD * torch.randn(1, pred_horizon, width))
        self.blocks = blocks(config.depth, memory=fusion == "cross_attention")
        self.head = nn.Linear(width, action_dim)
        if fusion in TOKEN_FUSIONS:
            self.token_embedding = TokenEmbedding(cond, width)
        self.readout_blocks = blocks(config.readout_depth if fusion == "readout" else 0, memory=False)
        if fusion == "readout":
            self.readouts = nn.Parameter(EMBEDDING_STD * torch.randn(1, config.num_readouts, width))
            self.cond_encoder = nn.Linear(config.num_readouts * width, config.embed_dim)
        elif fusion in ("film", "adaln") or config.global_vector:
            self.cond_encoder = nn.Sequential(
                nn.Linear(cond.global_dim, width), nn.SiLU(), nn.Linear(width, config.embed_dim)
            )
        else:
            self.cond_encoder = None
        self.time_encoder = nn.Sequential(
            nn.Linear(config.embed_dim, config.embed_dim), nn.SiLU(), nn.Linear(config.embed_dim, config.embed_dim)
        )
        self.per_branch = 2 if fusion == "film" else 3  # shift, scale and, but for film, gate
        self.num_modulations = 2 * self.per_branch * config.depth + 2
        self.time_modulation = nn.Linear(config.embed_dim, self.num_modulations * width)
        if self.cond_encoder is not None:
            self.cond_modulation = nn.Linear(config.embed_dim, self.num_modulations * width, bias=False)
        self._add_masks(config, cond)
        self.reset_parameters()

    def _add_masks(self, config: DitConfig, cond: ConditionSpec) -> None:
        """Buffers that travel with a checkpoint, True where a row may look at a column; None where all see all."""
        mask = may_look_back(self.pred_horizon) if config.causal else None
        frames = may_see_frames(self.pred_horizon, cond.frames) if config.causal else None
        among = None
        if self.fusion == "unified":
            mask = torch.cat([frames, mask], dim=1) if config.causal else None
            if len({kind == "state" for kind in cond.kinds}) == 2:
                among = prefix_mask(cond.kinds)
        self.register_buffer("action_mask", mask)  # (T_pred, T_pred), unified (T_pred, L + T_pred)
        self.register_buffer("frame_mask", frames if self.fusion == "cross_attention" else None)  # (T_pred, L)
        self.register_buffer("token_mask", among)  # (L, L)

    def reset_parameters(self) -> None:
        """Blocks: Xavier, biases 0. Modulation, head and attention to a memory: 0; film keeps PyTorch's start for the former."""
        for module in (*self.blocks.modules(), *self.readout_blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        at_zero = [block.memory_attn.out for block in self.blocks if block.memory_attn is not None]
        if self.fusion != "film":
            at_zero += [self.head, self.time_modulation]
            if self.cond_encoder is not None:
                at_zero.append(self.cond_modulation)
        for layer in at_zero:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: biases, norms and embeddings."""
        norms = {name for name, module in self.named_modules() if isinstance(module, nn.RMSNorm)}
        embeddings = {"positions", "readouts", "token_embedding.kinds", "token_embedding.frames"}
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith("bias") or name.rpartition(".")[0] in norms or name in embeddings
        }

    def prepare(self, condition: Condition) -> PreparedCondition:
        """All that does not depend on x_t and t, computed once per chunk; forward then gives the same numbers to the bit."""
        padding = condition.token_mask if self.fusion in TOKEN_FUSIONS else None
        kept: tuple[KeysValues | None, ...] = (None,) * len(self.blocks)
        mask, kept_mask, vector = self.action_mask, None, condition.global_cond
        if self.fusion in TOKEN_FUSIONS:
            tokens = self.token_embedding(condition.tokens)  # (B, L, W)
        if self.fusion == "cross_attention":
            kept = tuple(block.memory_attn.keys_values(norm(tokens)) for block in self.blocks)
            kept_mask = hide_padding(self.frame_mask, padding, behind=0)
        elif self.fusion == "unified":
            kept = keep_condition(self.blocks, tokens, hide_padding(self.token_mask, padding, keep_self=True))
            mask = hide_padding(self.action_mask, padding, behind=self.pred_horizon)
        elif self.fusion == "readout":
            vector = self._read_out(tokens, padding)  # (B, R * W)
        modulation = None
        if self.cond_encoder is not None:
            modulation = self.cond_modulation(F.silu(self.cond_encoder(vector))).unsqueeze(1)  # (B, 1, N)
        return PreparedCondition(modulation, kept, mask, kept_mask)

    def _read_out(self, tokens: Tensor, padding: Tensor | None) -> Tensor:
        """The condition's tokens (B, L, W) -> what the readout tokens made of them, (B, R * W)."""
        kept = keep_condition(self.readout_blocks, tokens, hide_padding(None, padding, keep_self=True))
        x = self.readouts.expand(len(tokens), -1, -1)
        mask = hide_padding(None, padding, behind=x.shape[1])
        for block, keys_values in zip(self.readout_blocks, kept, strict=True):
            x = block(x, UNMODULATED, mask, keys_values, None)
        return norm(x).flatten(1)

    def modulation_of_time(self, t: Tensor) -> Tensor:
        """The time's share of all shifts, scales and gates, which a table may hold: (B,) -> (B, 1, N), (B, T) -> (B, T, N)."""
        time = self.time_encoder(sinusoidal_embedding(t, self.embed_dim))
        shares = self.time_modulation(F.silu(time))
        return shares if t.ndim == 2 else shares.unsqueeze(1)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition | PreparedCondition) -> Tensor:
        """What the network was trained to predict, in the shape of x_t.

        Args:
            x_t: noisy chunk, (B, T_pred, D_act).
            t: network time, (B,), or (B, T_pred) where every action has its own.
            condition: what self.fusion uses of it, or what prepare made of it.
        """
        x, prepared, per_block, shift, scale = self._enter(x_t, t, condition)
        for block, modulation, kept in zip(self.blocks, per_block, prepared.kept, strict=True):
            x = block(x, modulation, prepared.mask, kept, prepared.kept_mask)
        return self.head(modulated(x, shift, scale))  # (B, T_pred, D_act)

    def _enter(
        self, x_t: Tensor, t: Tensor, condition: Condition | PreparedCondition
    ) -> tuple[Tensor, PreparedCondition, list[Modulation], Tensor, Tensor]:
        """Actions as tokens, the prepared condition, the blocks' modulations, and shift and scale before the head."""
        check_chunk(x_t, t, self.pred_horizon, self.action_dim, per_action=True)
        prepared = condition if isinstance(condition, PreparedCondition) else self.prepare(condition)
        shares = self.modulation_of_time(t.to(x_t.dtype))
        if prepared.modulation is not None:
            shares = shares + prepared.modulation
        *shares, shift, scale = shares.chunk(self.num_modulations, dim=-1)  # each (B, 1 or T_pred, W)
        branches = [tuple(shares[i : i + self.per_branch]) for i in range(0, len(shares), self.per_branch)]
        if self.fusion == "film":
            branches = [(*branch, None) for branch in branches]
        per_block = [first + second for first, second in zip(branches[::2], branches[1::2], strict=True)]
        return self.action_embedding(x_t) + self.positions, prepared, per_block, shift, scale

    @torch.no_grad()
    def attention_weights(self, x_t: Tensor, t: Tensor, condition: Condition | PreparedCondition) -> Tensor:
        """How much each action looks at each token of the condition, in every block: (depth, B, heads, T_pred, L).

        With cross_attention, rows sum to 1; with unified, what is missing to 1 goes to the actions.

        Raises:
            ValueError: in this fusion, actions do not look at tokens.
        """
        if self.fusion not in ("cross_attention", "unified"):
            raise ValueError(
                "attention over the condition's tokens needs denoiser.fusion=cross_attention or unified, "
                f"got denoiser.fusion={self.fusion}, where they reach the actions as one vector or not at all"
            )
        x, prepared, per_block, _, _ = self._enter(x_t, t, condition)
        weights = []
        for block, modulation, kept in zip(self.blocks, per_block, prepared.kept, strict=True):
            arguments = (modulation, prepared.mask, kept, prepared.kept_mask)
            weights.append(block.weights(x, *arguments))
            x = block(x, *arguments)
        return torch.stack(weights)


class TokenEmbedding(nn.Module):
    """The condition's tokens brought to the network's width, with learned embeddings of their kind and frame."""

    def __init__(self, cond: ConditionSpec, width: int):
        super().__init__()
        self.projection = nn.Linear(cond.token_dim, width)
        kinds, frames = list(dict.fromkeys(cond.kinds)), list(dict.fromkeys(cond.frames))
        self.kinds = nn.Parameter(EMBEDDING_STD * torch.randn(len(kinds), width))
        self.frames = nn.Parameter(EMBEDDING_STD * torch.randn(len(frames), width))  # one may stand for `no frame`
        self.register_buffer("kind_of", torch.tensor([kinds.index(kind) for kind in cond.kinds]))  # (L,)
        self.register_buffer("frame_of", torch.tensor([frames.index(frame) for frame in cond.frames]))

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D_token) -> (B, L, W)."""
        return self.projection(tokens) + self.kinds[self.kind_of] + self.frames[self.frame_of]
