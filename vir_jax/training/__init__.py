"""Training: state, step, sharding rules, optimiser, checkpoints, metrics and the loop."""

from vir_jax.extras import require

require("train", "absl", "ml_collections", "optax")
