"""The likelihood of images in a model of pixels, in any form of its mixer, and as generation computes it."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Int

from vir_jax.generation import pieces
from vir_jax.generation.pieces import GenerationState, check_generates
from vir_jax.models import VisionModel
from vir_jax.models.likelihood import check_symbols
from vir_jax.models.model import StreamModel

GENERATION = "generation"
"""The mode in which pixels are read one by one, as `generate` draws them."""


def log_likelihood(
    model: VisionModel, images: Int[Array, "b y x channels"], mode: str = "auto"
) -> Float32[Array, "b y x"]:
    """Return the log-probability of each pixel given those before, in nats; the sum over an image is its own.

    Args:
        model: made with stem="pixels".
        images: levels.
        mode: "auto", one of `model.modes`, or "generation"; all are equal but for rounding.

    Raises:
        ValueError: a model of patches, another mode, or levels that the model does not know.
    """
    check_symbols(images, pieces.stem_of(model).likelihood.levels, "an image")
    if mode != GENERATION:
        graph, variables = nnx.split(model)
        return _whole(graph, mode, variables, images)
    check_generates(model)
    apart_graph, apart_variables = nnx.split(model.apart())
    return _one_by_one(apart_graph, apart_variables, images)


@partial(jax.jit, static_argnums=(0, 1))
def _whole(
    graph: nnx.GraphDef[VisionModel], mode: str, variables: Any, images: Int[Array, "b y x channels"]
) -> Float32[Array, "b y x"]:
    model = nnx.merge(graph, variables)
    b, height, width, channels = images.shape
    outputs = model(images, mode=mode)
    symbols = images.reshape(b, height * width, channels)
    return pieces.stem_of(model).likelihood.log_probability(outputs, symbols).reshape(b, height, width)


@partial(jax.jit, static_argnums=0)
def _one_by_one(
    graph: nnx.GraphDef[StreamModel], variables: Any, images: Int[Array, "b y x channels"]
) -> Float32[Array, "b y x"]:
    model = nnx.merge(graph, variables)
    b, height, width, channels = images.shape

    def step(state: GenerationState, pixel: Array) -> tuple[GenerationState, Array]:
        state, log_probability = pieces.read(model, state, pixel[:, None], (height, width))
        return state, log_probability[:, 0]

    pixels = jnp.moveaxis(images.reshape(b, height * width, channels).astype(jnp.int32), 1, 0)
    _, found = jax.lax.scan(step, pieces.initial_state(model, b, (height, width)), pixels)
    return jnp.moveaxis(found, 0, 1).reshape(b, height, width)
