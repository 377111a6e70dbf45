"""Weights in and out: safetensors and JSON, in our own layout, timm's, Hugging Face's and the reviewer release's."""

from vir_jax.extras import require

require("train", "safetensors")

from vir_jax.weights.card import Card
from vir_jax.weights.errors import WeightsError
from vir_jax.weights.exchange import PretrainedModel, load, open_model, save, save_run
from vir_jax.weights.layouts import LAYOUTS
from vir_jax.weights.zoo import zoo_names

__all__ = [
    "LAYOUTS",
    "Card",
    "PretrainedModel",
    "WeightsError",
    "load",
    "open_model",
    "save",
    "save_run",
    "zoo_names",
]
