"""Encoders: normalised observations -> Condition. The family: name -> (Config, Class).

An encoder is an nn.Module built as `Class(config, spec=DataSpec, obs_horizon=T_obs)`:

    cond                         ConditionSpec: the sizes of what forward returns
    forward(obs) -> Condition    obs: role -> (B, T_obs, ...); states normalised floats, images uint8 (..., H, W, 3)

    lr_scales()                  optional: parameter name -> its learning rate over train.lr, where that is not 1

States are concatenated in the order of spec.state_keys. The tests of this family run on whatever is listed here.
"""

from diffpolicy.encoders.clip import ClipConfig, ClipEncoder
from diffpolicy.encoders.resnet import ResnetConfig, ResnetEncoder
from diffpolicy.encoders.state import StateConfig, StateEncoder

ENCODERS = {
    "state": (StateConfig, StateEncoder),
    "resnet": (ResnetConfig, ResnetEncoder),
    "clip": (ClipConfig, ClipEncoder),
}
