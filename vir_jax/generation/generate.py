"""Drawing images: a prompt is read in chunks, what follows is drawn pixel by pixel in one compiled loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float32, Int, Int32, Key

from vir_jax.generation import pieces
from vir_jax.generation.pieces import GenerationState, check_generates
from vir_jax.generation.sampling import Sampling, image_keys
from vir_jax.models import VisionModel
from vir_jax.models.likelihood import check_symbols
from vir_jax.models.model import StreamModel

# Pixels of a prompt that are read at a time.
CHUNK_SIZE = 512

Prompt = Int[Array, "k *m channels"] | Int[np.ndarray, "k *m channels"]
"""Levels of the first pixels of images in raster order [k, m, channels], or of their first rows [k, y, x, channels].

k is 1, or the number of images.
"""


def generate(
    model: VisionModel,
    key: Key[Array, ""],
    batch: int,
    prompt: Prompt | None = None,
    temperature: int | float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    image_size: tuple[int, int] | None = None,
    first: int = 0,
    chunk_size: int = CHUNK_SIZE,
    progress: Callable[[int], object] | None = None,
) -> tuple[Int32[Array, "b y x channels"], Float32[Array, "b y x"]]:
    """Draw images from a model of pixels, in memory that does not grow with them.

    Image i is drawn with `fold_in(key, first + i)`, and its pixel n with that folded with n. So an image depends
    neither on how many are drawn at a time, nor on how its prompt is read, but for the rounding of sums.

    Args:
        model: made with stem="pixels", whose mixer reads token after token.
        key: of all images.
        batch: how many images.
        prompt: what the images begin with, kept as it is; one prompt for all, or one for each. None: nothing.
        temperature: see `Sampling`, and the next two.
        top_k: see there.
        top_p: see there.
        image_size: (height, width) in pixels; None: what the model was made for.
        first: number of the first image.
        chunk_size: pixels of the prompt that are read at a time.
        progress: called with the number of rows that are done, after each row; None draws all in one loop.

    Returns:
        The images as levels, and the log-probability of each pixel given those before, in nats, prompt included: the
        model's own, whatever the temperature.

    Raises:
        ValueError: a model of patches, or an argument that it cannot do with.
    """
    check_generates(model)
    stem = pieces.stem_of(model)
    size = height, width = image_size or stem.image_size
    sampling, likelihood = Sampling(temperature, top_k, top_p), stem.likelihood
    sampling.check(likelihood.levels)
    if batch < 1 or chunk_size < 1:
        raise ValueError(f"batch is {batch} and chunk_size {chunk_size}; expected at least 1 each")
    given = _check_prompt(prompt, batch, size, likelihood.channels, likelihood.levels)

    state, log_probabilities = read_prompt(model, given, size, chunk_size=chunk_size)
    if len(given) < batch:
        state = pieces.repeat(state, batch)
    pixels = [jnp.broadcast_to(jnp.asarray(given), (batch, *given.shape[1:]))]
    found = [jnp.broadcast_to(log_probabilities, (batch, given.shape[1]))]
    done = given.shape[1]
    while done < height * width:
        steps = height * width - done if progress is None else width - done % width
        state, drawn, log_probability = advance(
            model, state, key, steps, sampling, image_size=size, first=first
        )
        pixels.append(drawn)
        found.append(log_probability)
        done += steps
        if progress is not None:
            jax.block_until_ready(drawn)
            progress(done // width)
    images = jnp.concatenate(pixels, axis=1).reshape(batch, height, width, likelihood.channels)
    return images, jnp.concatenate(found, axis=1).reshape(batch, height, width)


def read_prompt(
    model: VisionModel,
    prompt: Int32[Array, "k m channels"] | Int32[np.ndarray, "k m channels"],
    image_size: tuple[int, int],
    *,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[GenerationState, Float32[Array, "k m"]]:
    """Return the state after the first pixels of images, and the log-probability of each, in nats.

    Args:
        model: see `generate`.
        prompt: levels, none or more; checked by `generate`.
        image_size: (height, width) of the whole images.
        chunk_size: pixels that are read at a time.
    """
    graph, variables = nnx.split(model.apart())
    state = pieces.initial_state(nnx.merge(graph, variables), len(prompt), image_size)
    found = [jnp.zeros((len(prompt), 0), jnp.float32)]
    for start in range(0, prompt.shape[1], chunk_size):
        chunk = jnp.asarray(prompt[:, start : start + chunk_size], jnp.int32)
        state, log_probabilities = _read(graph, image_size, variables, state, chunk)
        found.append(log_probabilities)
    return state, jnp.concatenate(found, axis=1)


def advance(
    model: VisionModel,
    state: GenerationState,
    key: Key[Array, ""],
    steps: int,
    sampling: Sampling,
    *,
    image_size: tuple[int, int],
    first: int = 0,
) -> tuple[GenerationState, Int32[Array, "b n channels"], Float32[Array, "b n"]]:
    """Draw the next pixels: what `generate` repeats. To stop and go on later, keep the state and what was drawn.

    Args:
        model: see `generate`.
        state: after the pixels before, of `read_prompt` or of this function; its memory is used again.
        key: of all images.
        steps: how many pixels of each image.
        sampling: how each is drawn.
        image_size: (height, width) of the whole images.
        first: number of the first image.

    Returns:
        The state after them, their levels, and their log-probabilities in the model, in nats.
    """
    graph, variables = nnx.split(model.apart())
    keys = image_keys(key, first, state.recent.shape[0])
    return _draw(graph, image_size, steps, sampling, variables, state, keys)


@partial(jax.jit, static_argnums=(0, 1))
def _read(
    graph: nnx.GraphDef[StreamModel],
    image_size: tuple[int, int],
    variables: Any,
    state: GenerationState,
    pixels: Int32[Array, "k n channels"],
) -> tuple[GenerationState, Float32[Array, "k n"]]:
    return pieces.read(nnx.merge(graph, variables), state, pixels, image_size)


@partial(jax.jit, static_argnums=(0, 1, 2, 3), donate_argnums=5)
def _draw(
    graph: nnx.GraphDef[StreamModel],
    image_size: tuple[int, int],
    steps: int,
    sampling: Sampling,
    variables: Any,
    state: GenerationState,
    keys: Key[Array, " b"],
) -> tuple[GenerationState, Int32[Array, "b n channels"], Float32[Array, "b n"]]:
    model = nnx.merge(graph, variables)

    def step(state: GenerationState, _: None) -> tuple[GenerationState, tuple[Array, Array]]:
        state, pixel, log_probability = pieces.draw(model, state, keys, sampling, image_size)
        return state, (pixel, log_probability)

    state, (pixels, log_probabilities) = jax.lax.scan(step, state, None, length=steps)
    return state, jnp.moveaxis(pixels, 0, 1), jnp.moveaxis(log_probabilities, 0, 1)


def _check_prompt(
    prompt: Prompt | None, batch: int, image_size: tuple[int, int], channels: int, levels: int
) -> Int32[np.ndarray, "k m channels"]:
    """Return the pixels of a prompt in raster order.

    Raises:
        ValueError: it is no beginning of such images.
    """
    height, width = image_size
    if prompt is None:
        return np.zeros((1, 0, channels), np.int32)
    pixels = np.asarray(prompt)
    rows = pixels.ndim == 4
    if (
        pixels.ndim not in (3, 4)
        or pixels.shape[0] not in (1, batch)
        or pixels.shape[-1] != channels
        or (rows and pixels.shape[2] != width)
        or np.prod(pixels.shape[1:-1]) > height * width
    ):
        raise ValueError(
            f"the prompt has shape {pixels.shape}; expected [1 or {batch}, up to {height} rows, {width}, {channels}], "
            f"or [1 or {batch}, up to {height * width} pixels, {channels}]"
        )
    check_symbols(pixels, levels, "the prompt")
    return pixels.reshape(len(pixels), -1, channels).astype(np.int32)
