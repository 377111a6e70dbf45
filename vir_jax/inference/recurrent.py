"""Recurrent inference: all layers inside one loop over the patches, one state per layer (docs/method.md, section 3).

A chunk of patches is embedded, goes through every block, and leaves its mark on the blocks' states; its activations
are then forgotten. So memory depends on the chunk and, but for the pixels themselves, not on the image. What comes out
is what the model computes from the whole image in any other mode.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Num

from vir_jax.models import VisionModel
from vir_jax.models.embedding import Above
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import State
from vir_jax.models.model import StreamModel
from vir_jax.models.pixels import normalize
from vir_jax.models.stem import Stem, expected_images

# Patches read at a time: enough for the matrix products to be efficient.
CHUNK_SIZE = 512

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the colours in [0, 1]."""


class StreamState(NamedTuple):
    """All that is remembered of the patches read so far."""

    layers: tuple[State, ...]
    """Of each block, the state of its mixer."""
    patches: Int[Array, ""]
    """How many there were."""
    sum: Float32[Array, "b c"]
    """Of the last block's tokens, where the head reads their average; else zero."""
    above: Above
    """Of a convolutional stem, what it remembers of the rows above."""


def stream(
    model: VisionModel,
    images: Num[Array, "b H W colours"] | Num[np.ndarray, "b H W colours"],
    *,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> Float[Array, "b classes"]:
    """Classify images in memory that does not grow with them: `model(images)`, computed recurrently.

    Args:
        model: one whose mixer is causal, such as a ViR, 1-D or 2-D, and that reads the image once.
        images: normalised pixels; or uint8, which are normalised chunk by chunk and take a quarter of the memory.
        chunk_size: patches read at a time. In 2-D, or with a convolutional stem, whole rows of about so many patches;
            in 2-D no fewer rows than a tile of `retention_2d` has, for of each column there is a state to be read.
        normalization: (mean, std) of the colours in [0, 1] for uint8 images.

    Returns:
        Logits, float32.

    Raises:
        ValueError: for a model that cannot be computed so, or images that do not divide into patches.
    """
    model.check_streamable()
    stem_of(model)
    colours = colours_of(model.channels, normalization)
    if len(images.shape) != 4 or images.shape[-1] != colours:
        raise ValueError(f"images have shape {images.shape}; expected {expected_images(colours)}.")
    model.layout(images.shape[1:3])
    check_pixels(images.dtype, normalization)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
    graph, variables = nnx.split(model)
    return _stream(graph, variables, images, normalization, chunk_size)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _stream(
    graph: nnx.GraphDef[VisionModel],
    variables: Any,
    images: Num[Array, "b H W colours"],
    normalization: Normalization | None,
    chunk_size: int,
) -> Float[Array, "b classes"]:
    model = nnx.merge(graph, variables).apart()
    b, height, width, _ = images.shape
    state = initial_state(model, b, width)
    rows = height // model.stem.patch
    state = read_rows(model, state, images, rows=rows, chunk_size=chunk_size, normalization=normalization)
    return read_out(model, state, cols=width // model.stem.patch)


def initial_state(model: StreamModel, batch: int, width: int) -> StreamState:
    """Return the state before the first patch of images that are `width` pixels wide."""
    layout = Layout(cols=width // stem_of(model).patch, patches=0, class_token=None)
    return StreamState(
        layers=model.blocks.initial_state(batch, layout),
        patches=jnp.zeros((), jnp.int32),
        sum=jnp.zeros((batch, model.stem.dim), jnp.float32),
        above=stem_of(model).embedding.initial_state(batch, width),
    )


def rows_at_once(model: StreamModel, cols: int, chunk_size: int) -> int:
    """Return how many rows of `cols` patches are read together: of about so many patches, in 2-D a tile or more."""
    return max(chunk_size // cols, model.blocks.reads_rows, 1)


def read_rows(
    model: StreamModel,
    state: StreamState,
    pixels: Num[Array, "b H W colours"],
    *,
    rows: int | Int[Array, ""] | None,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> StreamState:
    """Read the next rows of patches.

    Args:
        model: of `VisionModel.apart`.
        state: after all rows above.
        pixels: whole rows of patches, any number of them.
        rows: of patches in the whole image, for which learned position embeddings are resampled.
        chunk_size: as for `stream`.
        normalization: as for `stream`.

    Returns:
        The state after these rows.
    """
    stem = stem_of(model)
    arriving, cols = pixels.shape[1] // stem.patch, pixels.shape[2] // stem.patch
    n, before = arriving * cols, state.patches
    if model.blocks.reads_rows or not stem.embedding.reads_patches:
        chunk_size = rows_at_once(model, cols, chunk_size) * cols
    chunk_size = min(chunk_size, n)
    position_embedding = stem.position.lookup(before // cols, (arriving, cols), rows)

    def normalized(pixels: Num[Array, "b H W colours"]) -> Float[Array, "b H W channels"]:
        return pixels if normalization is None else normalize(pixels, *normalization)

    def read_chunk(state: StreamState, start: Array | int, size: int) -> StreamState:
        y, x = Layout(cols=cols, patches=size, class_token=None, start=start).positions
        apart = stem.embedding.reads_patches
        cut = stem.cut(pixels, y, x) if apart else stem.cut_rows(pixels, y[0], size // cols)
        patches, above = stem.embedding.read(normalized(cut), state.above)
        tokens = patches.reshape(-1, size, stem.dim) + position_embedding(y, x)
        layout = Layout(cols=cols, patches=size, class_token=None, start=before + start)
        tokens, layers = model.blocks(tokens, layout, state.layers)
        total = state.sum
        if model.readout.reads == "average":
            total += jnp.sum(tokens, axis=1)
        return StreamState(layers, state.patches + size, total, above)

    def step(state: StreamState, start: Array) -> tuple[StreamState, None]:
        return read_chunk(state, start, chunk_size), None

    chunks, rest = divmod(n, chunk_size)
    state, _ = jax.lax.scan(step, state, chunk_size * jnp.arange(chunks, dtype=jnp.int32))
    return read_chunk(state, n - rest, rest) if rest else state


def read_out(model: StreamModel, state: StreamState, *, cols: int) -> Float[Array, "b classes"]:
    """Return logits from what was read so far, of images `cols` patches wide. The state is left as it is.

    The class token comes as if the image ended here.
    """
    if model.readout.reads == "average":
        return model.readout.logits(state.sum / state.patches)
    token = stem_of(model).class_tokens(state.sum.shape[0])
    layout = Layout(cols=cols, patches=0, class_token="last", start=state.patches)
    token, _ = model.blocks(token, layout, state.layers)
    return model.readout.logits(token[:, 0])


def stem_of(model: VisionModel | StreamModel) -> Stem:
    """Return what embeds the patches of a model, whole or apart.

    Raises:
        ValueError: the model has no patches: it predicts pixels.
    """
    if not isinstance(model.stem, Stem):
        raise ValueError(
            "a model of pixels predicts each of them from those before, and says nothing of the image; expected one "
            "of patches. Use `vir_jax.generation`."
        )
    return model.stem


def colours_of(channels: int, normalization: Normalization | None) -> int:
    """Return how many colours the pixels of a model's images have: of those that are normalised here, three at least.

    A grey model takes the average of RGB, as in training.
    """
    return channels if normalization is None else max(channels, 3)


def check_pixels(dtype: Any, normalization: Normalization | None) -> None:
    """Check that pixels are uint8 and come with their normalisation, or are floating point and do not.

    Raises:
        ValueError: neither.
    """
    if normalization is None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"pixels are {dtype}; expected floating point, normalised as in training, or uint8 and "
            "normalization=(mean, std)."
        )
    if normalization is not None and dtype != jnp.uint8:
        raise ValueError(f"pixels are {dtype}; expected uint8, for a normalization was given.")
