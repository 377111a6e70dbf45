"""Images on the host: sources, decoding, augmentation and batching, in NumPy and without TensorFlow."""

from vir_jax.extras import require

require("train", "absl", "cv2", "grain", "PIL", "simplejpeg", "tifffile")

from vir_jax.data.augment import AugmentConfig, augment_image, augment_with_mask
from vir_jax.data.corrupt import check_examples
from vir_jax.data.decode import decode_image
from vir_jax.data.errors import CorruptExampleError, CorruptImageError, TooManyCorruptError
from vir_jax.data.loader import (
    EvalBatch,
    EvalLoader,
    TrainBatch,
    TrainLoader,
    eval_loader,
    train_loader,
)
from vir_jax.data.resize import eval_transform
from vir_jax.data.source import Example, Source, check_labels
from vir_jax.data.sources import open_source

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
    "augment_with_mask",
    "check_examples",
    "check_labels",
    "decode_image",
    "eval_loader",
    "eval_transform",
    "open_source",
    "train_loader",
]
