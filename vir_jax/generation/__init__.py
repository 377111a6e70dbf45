"""Images drawn from a model of pixels one pixel after the other, with one state per layer, and their likelihood."""

from vir_jax.generation.generate import generate
from vir_jax.generation.likelihood import log_likelihood
from vir_jax.generation.sampling import Sampling

__all__ = ["Sampling", "generate", "log_likelihood"]
