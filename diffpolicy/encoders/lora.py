"""Low-rank adapters on a frozen tower: y = W x + b + (alpha / rank) B A x, where only A and B learn.

Hu et al. 2021, arXiv:2106.09685, Eq. 3; by peft, which is an extra (`pip install 'diffpolicy[lora]'`).

peft can adapt torch's nn.MultiheadAttention, whose projections are packed, only by adding B A to the frozen weights before
each pass and subtracting it afterwards: they drift by rounding, are other Parameters after each pass, and dropout does
nothing. So the attention of open_clip's blocks is first rebuilt with two ordinary linear layers (PlainAttention).
"""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F

from diffpolicy.spec import MissingExtraError, unknown_name

TARGETS = {
    "open_clip": ("in_proj", "out_proj", "c_fc", "c_proj"),
    "timm": ("qkv", "proj", "fc1", "fc2"),
}
"""Linear layers of a block that can be adapted: queries, keys and values; attention's output; the MLP's two."""
ADAPTER = "default"
"""The name that peft gives to an adapter, part of its parameters' names."""


class PlainAttention(nn.Module):
    """nn.MultiheadAttention(batch_first=True) of a sequence with itself, with linear layers that can be replaced.

    The same numbers but for rounding, and as fast.
    """

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        assert packed.batch_first and packed._qkv_same_embed_dim and packed.bias_k is None and packed.dropout == 0
        self.num_heads = packed.num_heads
        width = packed.embed_dim
        self.in_proj = nn.Linear(width, 3 * width, device="meta")
        self.in_proj.weight, self.in_proj.bias = packed.in_proj_weight, packed.in_proj_bias
        self.out_proj = nn.Linear(width, width, device="meta")
        self.out_proj.weight, self.out_proj.bias = packed.out_proj.weight, packed.out_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """(N, L, W) three times the same -> (N, L, W); attn_mask (L, L) or (N * heads, L, L) is added to the scores."""
        assert query is key is value and not need_weights, "blocks of open_clip attend to themselves"
        heads = lambda x: x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, L, W / heads)
        q, k, v = self.in_proj(query).chunk(3, dim=-1)
        if attn_mask is not None and attn_mask.ndim == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads))
        found = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), attn_mask)
        return self.out_proj(found.transpose(1, 2).flatten(2)), None


def add_adapters(tower: nn.Module, *, rank: int, alpha: float, dropout: float, targets: tuple[str, ...] | None) -> None:
    """Freezes a tower and puts learning adapters on linear layers of its blocks; it computes what it did before.

    Args:
        targets: names of TARGETS; None: all of them.
    Raises:
        MissingExtraError: peft is not installed.
        ValueError: the tower is no Transformer, or has no layer of that name.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingExtraError("peft", "lora") from None
    in_timm = hasattr(tower, "trunk")
    blocks = tower.trunk if in_timm else getattr(tower, "transformer", None)
    blocks = getattr(blocks, "blocks" if in_timm else "resblocks", None)
    if blocks is None:
        raise ValueError(
            f"encoder.tuning=lora needs a Transformer of open_clip or timm, got {type(tower).__name__}; use frozen or full"
        )
    for block in blocks:
        if isinstance(getattr(block, "attn", None), nn.MultiheadAttention):
            block.attn = PlainAttention(block.attn)
    known = TARGETS["timm" if in_timm else "open_clip"]
    inside = "blocks" if in_timm else "resblocks"
    for target in targets or known:
        if target not in known:
            raise unknown_name("a name of encoder.lora_targets", target, known)
        linear = [m for name, m in blocks.named_modules() if name.rpartition(".")[2] == target]
        if not linear or not all(isinstance(m, nn.Linear) for m in linear):
            raise ValueError(
                f"encoder.lora_targets names {target!r}, which is no linear layer of this tower's blocks "
                f"({type(blocks[0]).__name__}); leave it out, or use encoder.tuning=last_n"
            )
    names = "|".join(re.escape(target) for target in targets or known)
    inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=rf".*\b{inside}\.\d+\..*\b({names})"),
        tower,
        adapter_name=ADAPTER,
    )
    for name, parameter in tower.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    tower.train(tower.training)  # the new layers were not told


def merge_adapters(tower: nn.Module) -> nn.Module:
    """Adds the adapters to the weights they belong to, for good: what is used is then as fast as a tower without.

    The tower cannot be saved or trained as before; of a tower without adapters nothing changes.
    """
    for name, module in list(tower.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "merge"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(tower.get_submodule(parent), child, module.get_base_layer())
    return tower
