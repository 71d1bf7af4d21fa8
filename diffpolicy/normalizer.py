"""Normaliser: physical units <-> about [-1, 1], per key and dimension, with statistics that are saved with the policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.spec import unknown_name

MODES = ("limits", "gaussian", "quantile", "identity")


@dataclass(frozen=True, kw_only=True)
class NormalizerConfig:
    action: str = "limits"
    """Mode of the action: limits (min/max to [-1, 1]), gaussian (mean 0, sd 1), quantile (1 % .. 99 % to [-1, 1]), identity."""
    observation: str = "limits"
    """Mode of every low-dimensional observation. Images are scaled by their encoder."""
    range_floor: float = 1e-4
    """A range (or sd) smaller than this, in the key's own unit, counts as this, so that sensor noise is not blown up."""

    def __post_init__(self):
        for name in ("action", "observation"):
            if getattr(self, name) not in MODES:
                raise unknown_name(f"normalizer.{name}", getattr(self, name), MODES)


class Normalizer(nn.Module):
    """x_norm = x * scale + offset, per key and dimension; scale and offset are buffers.

    A constant dimension is centred on 0 with scale 1, as in Diffusion Policy; a tiny range is floored. min and max of
    the training data are kept beside, so that a reader of a checkpoint sees what the policy has been shown.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], modes: dict[str, str], *, range_floor: float = 1e-4):
        super().__init__()
        self.shapes, self.modes, self.range_floor = dict(shapes), dict(modes), range_floor
        for key, shape in shapes.items():
            if modes[key] not in MODES:
                raise unknown_name(f"normaliser mode of {key}", modes[key], MODES)
            for stat in ("scale", "offset", "min", "max"):
                self.register_buffer(self._name(key, stat), torch.full(shape, float("nan")))

    @staticmethod
    def _name(key: str, stat: str) -> str:
        return f"{key.replace('.', '/')}:{stat}"  # a buffer's name cannot hold a dot

    def stat(self, key: str, stat: str) -> Tensor:
        """scale, offset, min or max of a key, (*shape)."""
        if key not in self.shapes:
            raise ValueError(f"the normaliser has no statistics for {key!r}; it knows {sorted(self.shapes)}")
        return getattr(self, self._name(key, stat))

    @torch.no_grad()
    def fit(self, key: str, values: Tensor) -> None:
        """Takes the statistics of values (N, *shape), in physical units.

        Raises:
            ValueError: no rows, a shape that differs, or a number that is not finite.
        """
        shape = tuple(self.shapes[key])
        if len(values) == 0 or tuple(values.shape[1:]) != shape:
            raise ValueError(
                f"statistics of {key} need (N, {', '.join(map(str, shape))}) values, got {tuple(values.shape)}"
            )
        x = values.double()
        if not torch.isfinite(x).all():
            row = int((~torch.isfinite(x.flatten(1))).any(dim=1).nonzero()[0])
            raise ValueError(f"{key} holds NaN or inf first at row {row}; find it with `diffpolicy data validate`")
        low, high = x.amin(dim=0), x.amax(dim=0)
        constant = high - low <= 1e-7 * torch.maximum(low.abs(), high.abs())  # below float32 resolution
        mode = self.modes[key]
        if mode == "identity":
            scale, offset = torch.ones_like(low), torch.zeros_like(low)
        elif mode == "gaussian":
            scale = 1 / x.std(dim=0, unbiased=False).clamp_min(self.range_floor)
            scale = torch.where(constant, torch.ones_like(scale), scale)
            offset = -x.mean(dim=0) * scale
        else:
            if mode == "quantile":
                q_low, q_high = (_quantile(x, q) for q in (0.01, 0.99))
                # a dimension that rests on one value most of the time (a gripper) has no inner range: use its limits
                inner = q_high - q_low > 1e-7 * torch.maximum(q_low.abs(), q_high.abs())
                low, high = torch.where(inner, q_low, low), torch.where(inner, q_high, high)
            scale = 2 / (high - low).clamp_min(self.range_floor)
            scale = torch.where(constant, torch.ones_like(scale), scale)
            offset = -(low + high) / 2 * scale
        for stat, value in (("scale", scale), ("offset", offset), ("min", x.amin(dim=0)), ("max", x.amax(dim=0))):
            self.stat(key, stat).copy_(value)

    def set(self, key: str, scale: Tensor, offset: Tensor) -> None:
        """Statistics from elsewhere (an imported checkpoint); min and max become the values that map to -1 and 1."""
        self.stat(key, "scale").copy_(scale)
        self.stat(key, "offset").copy_(offset)
        self.stat(key, "min").copy_((-1 - offset) / scale)
        self.stat(key, "max").copy_((1 - offset) / scale)

    def require_fitted(self) -> None:
        """Raises ValueError, naming the keys, where statistics are missing: data must never pass through unscaled."""
        missing = [key for key in self.shapes if not torch.isfinite(self.stat(key, "scale")).all()]
        if missing:
            raise ValueError(
                f"normaliser statistics are missing for {missing}; fit them, or load a complete checkpoint"
            )

    def normalize(self, key: str, x: Tensor) -> Tensor:
        """Physical units -> normalised; x is (..., *shape)."""
        return x * self.stat(key, "scale") + self.stat(key, "offset")

    def unnormalize(self, key: str, x: Tensor) -> Tensor:
        """Normalised -> physical units; x is (..., *shape)."""
        return (x - self.stat(key, "offset")) / self.stat(key, "scale")


def _quantile(x: Tensor, q: float) -> Tensor:
    """Per-dimension quantile by sorting; torch.quantile refuses more than 2**24 numbers."""
    return x.sort(dim=0).values[round(q * (len(x) - 1))]
