"""Flax NNX models built on `vir_jax.ops`: ViR, and ViT as its baseline on the same skeleton."""

from vir_jax.models.backbone import VisionBackbone
from vir_jax.models.cost import flops
from vir_jax.models.position import resample_position_embedding
from vir_jax.models.variants import MODEL_NAMES, create_model, parse_name

__all__ = [
    "MODEL_NAMES",
    "VisionBackbone",
    "create_model",
    "flops",
    "parse_name",
    "resample_position_embedding",
]
