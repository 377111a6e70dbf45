"""Matplotlib figures on top of the arrays of `vir_jax.inspection`; every function returns a `Figure`."""

from vir_jax.extras import require

require("inspect", "matplotlib")

from vir_jax.inspection.figures.contributions import draw_layer_shares, draw_logit
from vir_jax.inspection.figures.curves import draw_curves
from vir_jax.inspection.figures.decay import draw_half_lives, draw_masks, draw_seen_from, draw_widths
from vir_jax.inspection.figures.modes import draw_mode_costs, draw_mode_errors
from vir_jax.inspection.figures.state import draw_reading, draw_states

__all__ = [
    "draw_curves",
    "draw_half_lives",
    "draw_layer_shares",
    "draw_logit",
    "draw_masks",
    "draw_mode_costs",
    "draw_mode_errors",
    "draw_reading",
    "draw_seen_from",
    "draw_states",
    "draw_widths",
]
