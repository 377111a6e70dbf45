"""Images on the host: sources, decoding, augmentation and batching, in NumPy and without TensorFlow."""

from vir_jax.data.augment import AugmentConfig, augment_image
from vir_jax.data.decode import CorruptImageError, decode_image
from vir_jax.data.loader import (
    EvalBatch,
    EvalLoader,
    TooManyCorruptError,
    TrainBatch,
    TrainLoader,
    eval_loader,
    train_loader,
)
from vir_jax.data.resize import eval_transform
from vir_jax.data.source import CorruptExampleError, Example, Source, open_source

__all__ = [
    "AugmentConfig",
    "CorruptExampleError",
    "CorruptImageError",
    "EvalBatch",
    "EvalLoader",
    "Example",
    "Source",
    "TooManyCorruptError",
    "TrainBatch",
    "TrainLoader",
    "augment_image",
    "decode_image",
    "eval_loader",
    "eval_transform",
    "open_source",
    "train_loader",
]
