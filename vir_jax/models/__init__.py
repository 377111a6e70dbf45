"""Flax NNX models built on `vir_jax.ops`: ViR, and ViT and other mixers on the same skeleton."""

from vir_jax.models.cost import flops
from vir_jax.models.model import VisionModel
from vir_jax.models.position import resample_position_embedding
from vir_jax.models.pyramid import fold_batch_norm
from vir_jax.models.variants import MODEL_NAMES, create_model, model_options, parse_name

__all__ = [
    "MODEL_NAMES",
    "VisionModel",
    "create_model",
    "flops",
    "fold_batch_norm",
    "model_options",
    "parse_name",
    "resample_position_embedding",
]
