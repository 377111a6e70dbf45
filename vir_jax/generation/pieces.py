"""Reading and drawing pixels in pieces: the state between them, and a step of one pixel."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int32, Key

from vir_jax.generation.sampling import Sampling
from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import State
from vir_jax.models.model import StreamModel
from vir_jax.models.pixel_stem import PixelStem


class GenerationState(NamedTuple):
    """All that is remembered of the pixels so far: a small tree of arrays, whatever their number."""

    layers: tuple[State, ...]
    """Of each block, the state of its mixer."""
    recent: Int32[Array, "b reach channels"]
    """The last pixels, as many as a token may see, the newest last."""
    pixels: Int[Array, ""]
    """How many there were."""


def stem_of(model: VisionModel | StreamModel) -> PixelStem:
    """Return what embeds the pixels.

    Raises:
        ValueError: the model does not predict pixels.
    """
    if not isinstance(model.stem, PixelStem):
        raise ValueError(
            "the model predicts no pixels: its tokens are patches. Use one made with stem='pixels'."
        )
    return model.stem


def check_generates(model: VisionModel) -> None:
    """Check that a model can draw images pixel by pixel.

    Raises:
        ValueError: it cannot, and why.
    """
    stem_of(model)
    if model.mixer.reads_rows:
        raise ValueError(
            "a model that mixes whole rows at once (retention='2d') cannot draw pixel by pixel. Use retention='1d'."
        )


def initial_state(model: StreamModel, batch: int, image_size: tuple[int, int]) -> GenerationState:
    """Return the state before the first pixel of images of (height, width) pixels."""
    stem = stem_of(model)
    shape = batch, stem.reach(image_size[1]), stem.likelihood.channels
    return GenerationState(
        layers=model.blocks.initial_state(batch, stem.layout(image_size)),
        recent=jnp.zeros(shape, jnp.int32),
        pixels=jnp.zeros((), jnp.int32),
    )


def read(
    model: StreamModel,
    state: GenerationState,
    pixels: Int32[Array, "b n channels"],
    image_size: tuple[int, int],
) -> tuple[GenerationState, Float[Array, "b n"]]:
    """Read the next pixels, all at once: the state after them, and the log-probability of each, in nats."""
    stem = stem_of(model)
    reach = state.recent.shape[1]
    sequence = jnp.concatenate([state.recent, pixels], axis=1)
    outputs, layers = _outputs(model, state, sequence[:, :-1], image_size)
    log_probabilities = stem.likelihood.log_probability(outputs, pixels)
    return GenerationState(layers, sequence[:, -reach:], state.pixels + pixels.shape[1]), log_probabilities


def log_masses(
    model: StreamModel, state: GenerationState, image_size: tuple[int, int]
) -> Float[Array, "b levels"]:
    """Return the log-probability of every level of the next pixel, in nats, of grey images."""
    likelihood = stem_of(model).likelihood
    outputs, _ = _outputs(model, state, state.recent, image_size)
    return likelihood.log_probability(outputs, jnp.arange(likelihood.levels, dtype=jnp.int32)[:, None])


def draw(
    model: StreamModel,
    state: GenerationState,
    keys: Key[Array, " b"],
    sampling: Sampling,
    image_size: tuple[int, int],
) -> tuple[GenerationState, Int32[Array, "b channels"], Float[Array, " b"]]:
    """Draw the next pixel of each image: the state after it, the pixel, and its log-probability, in nats."""
    likelihood = stem_of(model).likelihood
    outputs, layers = _outputs(model, state, state.recent, image_size)
    pixel = likelihood.sample(outputs[:, 0], sampling.draws(keys, state.pixels))
    recent = jnp.concatenate([state.recent[:, 1:], pixel[:, None]], axis=1)
    return (
        GenerationState(layers, recent, state.pixels + 1),
        pixel,
        likelihood.log_probability(outputs[:, 0], pixel),
    )


def _outputs(
    model: StreamModel,
    state: GenerationState,
    earlier: Int32[Array, "b m channels"],
    image_size: tuple[int, int],
) -> tuple[Float[Array, "b n outputs"], tuple[State, ...]]:
    """Return what describes each of the next pixels, and the blocks' states."""
    height, width = image_size
    patches = earlier.shape[1] - state.recent.shape[1] + 1
    layout = Layout(cols=width, patches=patches, class_token=None, start=state.pixels)
    tokens = stem_of(model).piece(earlier, layout, height)
    tokens, layers = model.blocks(tokens, layout, state.layers)
    return model.readout(tokens, layout), layers


def repeat(state: GenerationState, batch: int) -> GenerationState:
    """Return the state of one image as that of `batch` images."""

    def repeated(leaf: Array) -> Array:
        return jnp.broadcast_to(leaf, (batch, *leaf.shape[1:]))

    return GenerationState(jax.tree.map(repeated, state.layers), repeated(state.recent), state.pixels)
