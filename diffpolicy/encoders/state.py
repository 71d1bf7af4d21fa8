"""Low-dimensional observations as a condition: as they are, or through an MLP per frame."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffpolicy.spec import Condition, ConditionSpec, DataSpec, Observation, frame_tokens


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """Choices of StateEncoder; the defaults hand the numbers on as they are, as the reference's state recipes do."""

    hidden_dims: tuple[int, ...] = ()
    """Hidden widths of an MLP over each frame; needs output_dim."""
    output_dim: int | None = None
    """Width of an encoded frame; None: no MLP."""

    def __post_init__(self):
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        if self.hidden_dims and self.output_dim is None:
            raise ValueError(f"encoder.output_dim must be set where encoder.hidden_dims is, got {self.hidden_dims}")
        if any(dim < 1 for dim in self.hidden_dims):
            raise ValueError(f"encoder.hidden_dims must all be at least 1, got {self.hidden_dims}")
        if self.output_dim is not None and self.output_dim < 1:
            raise ValueError(f"encoder.output_dim must be at least 1, got {self.output_dim}")


def concatenate_states(obs: Observation, spec: DataSpec, obs_horizon: int) -> Tensor:
    """All low-dimensional observations of each frame side by side, in the order of spec.state_keys.

    Returns:
        (B, T_obs, D_state)
    Raises:
        ValueError: a key is missing or has another shape than the spec says.
    """
    states = []
    for key in spec.state_keys:
        state = take_observation(obs, key, (obs_horizon, *spec.fields[key].shape))
        states.append(state.flatten(2) if state.ndim > 2 else state.unsqueeze(-1))
    return torch.cat(states, dim=-1)


def take_observation(obs: Observation, key: str, shape: tuple[int, ...]) -> Tensor:
    """obs[key], checked to be (B, *shape)."""
    if key not in obs:
        raise ValueError(f"observation must have {key!r}, as the policy's spec says; got {sorted(obs)}")
    if tuple(obs[key].shape[1:]) != shape:
        sizes = ", ".join(str(n) for n in shape[1:])
        raise ValueError(f"{key} must be (B, T_obs={shape[0]}, {sizes}), got {tuple(obs[key].shape)}")
    return obs[key]


class StateEncoder(nn.Module):
    """One token per observed frame; the global vector is all of them in a row, oldest first.

        frames (B, T_obs, D_state) -- identity or MLP --> tokens (B, T_obs, D) -- flatten --> global_cond (B, T_obs * D)

    Cameras and a goal image, where the spec has some, are not looked at, which is said aloud.
    """

    def __init__(self, config: StateConfig, *, spec: DataSpec, obs_horizon: int):
        super().__init__()
        if not spec.state_keys:
            raise ValueError(
                f"encoder.name=state needs low-dimensional observations, the data has only {sorted(spec.fields)}; "
                "use encoder.name=resnet for cameras"
            )
        if pictures := (*spec.image_keys, *spec.goal_keys):
            warnings.warn(f"encoder.name=state does not look at {pictures}; drop them from data.keys", stacklevel=2)
        self.spec = spec
        self.obs_horizon = obs_horizon
        if config.output_dim is None:
            self.frame_encoder = nn.Identity()
            token_dim = spec.state_dim
        else:
            layers: list[nn.Module] = []
            dim = spec.state_dim
            for hidden_dim in config.hidden_dims:
                layers += [nn.Linear(dim, hidden_dim), nn.Mish()]
                dim = hidden_dim
            self.frame_encoder = nn.Sequential(*layers, nn.Linear(dim, config.output_dim))
            token_dim = config.output_dim
        self.cond = ConditionSpec(
            global_dim=obs_horizon * token_dim, groups=frame_tokens(obs_horizon), token_dim=token_dim
        )

    def forward(self, obs: Observation) -> Condition:
        """obs: role -> (B, T_obs, ...), normalised -> Condition."""
        tokens = self.frame_encoder(concatenate_states(obs, self.spec, self.obs_horizon))  # (B, T_obs, D)
        return Condition(global_cond=tokens.flatten(1), tokens=tokens)
