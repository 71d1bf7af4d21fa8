"""Policies: observation -> action chunk in physical units. Baselines under the same interface get their line here."""

from diffpolicy.policies.diffusion import DiffusionPolicy

POLICIES = {
    "diffusion": DiffusionPolicy,
}

__all__ = ["POLICIES", "DiffusionPolicy"]
