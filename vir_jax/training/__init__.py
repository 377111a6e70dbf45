"""Training: state, step, sharding rules, optimiser, checkpoints, metrics and the loop."""
