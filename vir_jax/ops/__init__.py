"""Retention on arrays: pure functions, JAX alone."""

from vir_jax.ops.checks import MODES
from vir_jax.ops.decay import decay_mask, decay_mask_2d, retnet_log_decay, vir_log_decay
from vir_jax.ops.grid import retention_2d
from vir_jax.ops.sequence import retention

__all__ = [
    "MODES",
    "decay_mask",
    "decay_mask_2d",
    "retention",
    "retention_2d",
    "retnet_log_decay",
    "vir_log_decay",
]
