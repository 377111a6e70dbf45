"""Looking inside a ViR: arrays from pure functions.

`vir_jax.inspection.figures` draws them (it needs matplotlib), `vir_jax.inspection.workdir` opens the folder of a run.
"""

from vir_jax.inspection.contributions import (
    LayerContributions,
    LogitContributions,
    layer_contributions,
    logit_contributions,
)
from vir_jax.inspection.curves import Curve, metric_curves
from vir_jax.inspection.decay import decay_at_arrival, decay_row, half_life, half_life_in_rows, on_grid
from vir_jax.inspection.modes import Cost, errors_by_token, retention_costs, tokens_by_mode
from vir_jax.inspection.reading import logits_as_read
from vir_jax.inspection.state import (
    StateSummary,
    effective_rank,
    state_bytes,
    states_as_read,
    summarize_states,
)

__all__ = [
    "Cost",
    "Curve",
    "LayerContributions",
    "LogitContributions",
    "StateSummary",
    "decay_at_arrival",
    "decay_row",
    "effective_rank",
    "errors_by_token",
    "half_life",
    "half_life_in_rows",
    "layer_contributions",
    "logit_contributions",
    "logits_as_read",
    "metric_curves",
    "on_grid",
    "retention_costs",
    "state_bytes",
    "states_as_read",
    "summarize_states",
    "tokens_by_mode",
]
