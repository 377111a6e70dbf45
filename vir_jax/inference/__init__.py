"""Inference on images of any size in constant memory: whole, arriving over time, or from files larger than memory."""

from vir_jax.inference.image_stream import ImageStream
from vir_jax.inference.recurrent import stream

__all__ = ["ImageStream", "stream"]
