"""Denoisers: (x_t, t, condition) -> prediction. The family: name -> (Config, Class).

A denoiser is an nn.Module built as `Class(config, action_dim=, pred_horizon=, cond=ConditionSpec)`:

    forward(x_t (B, T_pred, D_act), t (B,), condition) -> (B, T_pred, D_act)
    no_weight_decay() -> names of its parameters that the optimiser must not decay
    prepare(condition) -> prepared       optional: what the condition contributes to every denoising step of a chunk

Where there is a `prepare`, forward takes its result in place of the condition and answers the same up to rounding (`dit`:
to the bit). The result is for the rows it was made of: repeat a condition for several samples, or concatenate it for
guidance, before preparing it.

`t` is the network time the process hands over (step numbers for DDPM); `dit` also takes one per action, (B, T_pred).
What the prediction means (epsilon, sample, velocity) is the process's business. The tests of this family run on whatever
is listed here.
"""

from diffpolicy.denoisers.dit import Dit, DitConfig
from diffpolicy.denoisers.mlp import MlpConfig, MlpDenoiser
from diffpolicy.denoisers.transformer import DiffusionTransformer, TransformerConfig
from diffpolicy.denoisers.unet import ConditionalUnet1d, UnetConfig

DENOISERS = {
    "unet": (UnetConfig, ConditionalUnet1d),
    "transformer": (TransformerConfig, DiffusionTransformer),
    "mlp": (MlpConfig, MlpDenoiser),
    "dit": (DitConfig, Dit),
}
