"""diffpolicy: robot action chunks by diffusion."""

__version__ = "0.1.0"
