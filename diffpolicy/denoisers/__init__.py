"""Denoisers: (x_t, t, condition) -> prediction. The family: name -> (Config, Class).

A denoiser is an nn.Module built as `Class(config, action_dim=, pred_horizon=, cond=ConditionSpec)`:

    forward(x_t (B, T_pred, D_act), t (B,), condition) -> (B, T_pred, D_act)
    no_weight_decay() -> names of its parameters that the optimiser must not decay

`t` is the network time the process hands over (step numbers for DDPM). What the prediction means (epsilon, sample,
velocity) is the process's business. The tests of this family run on whatever is listed here.
"""

from diffpolicy.denoisers.mlp import MlpConfig, MlpDenoiser
from diffpolicy.denoisers.transformer import DiffusionTransformer, TransformerConfig
from diffpolicy.denoisers.unet import ConditionalUnet1d, UnetConfig

DENOISERS = {
    "unet": (UnetConfig, ConditionalUnet1d),
    "transformer": (TransformerConfig, DiffusionTransformer),
    "mlp": (MlpConfig, MlpDenoiser),
}
