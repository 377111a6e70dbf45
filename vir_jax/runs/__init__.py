"""What a run leaves on disk and how it is read back: config, checkpoints, metrics, and the model they belong to."""

from vir_jax.extras import require

require("train", "absl", "etils", "grain", "ml_collections", "orbax", "tensorboard", "tensorstore", "tqdm")
