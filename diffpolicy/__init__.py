"""diffpolicy: robot action chunks by diffusion.

    *.zarr --replay--> episodes --windows--> obs (B,T_obs,...) actions (B,T_pred,D_act) --normalizer--> [-1,1]
      --encoders--> Condition --denoisers + processes (+ guidance)--> x_0 (B,T_pred,D_act) --normalizer--> chunk, physical units
      --executors--> action (B,D_act) --envs--> rollout --> metrics, plots      train closes the first half; ablate repeats the whole

`import diffpolicy` loads nothing heavy; the names below are fetched on first use.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_PLACES = {
    "Horizons": "spec",
    "DataSpec": "spec",
    "ReplayBuffer": "replay",
    "window_indices": "windows",
    "load_windows": "windows",
    "Normalizer": "normalizer",
    "DiffusionPolicy": "policies",
    "SamplerConfig": "processes",
    "RecedingHorizon": "executors",
    "make_env": "envs",
    "load_config": "config",
    "build_policy": "config",
    "load_policy": "checkpoint",
    "save_policy": "checkpoint",
}
"""Public name -> the module that defines it."""

__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module 'diffpolicy' has no attribute {name!r}")
    return getattr(importlib.import_module(f"diffpolicy.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
