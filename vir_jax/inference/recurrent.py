"""Recurrent inference: all layers inside one loop over the patches, one state per layer (docs/method.md, section 3).

A chunk of patches is embedded, goes through every block, and leaves its mark on the blocks' states; its activations
are then forgotten. So memory depends on the chunk and, but for the pixels themselves, not on the image. What comes out
is what the model computes from the whole image in any other mode.
"""

from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from vir_jax.models import VisionModel
from vir_jax.models.layout import Layout
from vir_jax.models.model import StreamModel
from vir_jax.models.pixel_stem import PixelStem
from vir_jax.models.pixels import normalize
from vir_jax.models.pyramid_stream import PyramidStream
from vir_jax.models.readout import DENSE
from vir_jax.models.stem import Stem, expected_images, patch_grid
from vir_jax.models.stream_state import StreamState

# Patches read at a time: enough for the matrix products to be efficient.
CHUNK_SIZE = 512

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the colours in [0, 1]."""


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
        ValueError: for a model that cannot be computed so, or images that do not divide into patches; for one that
            gives logits to each pixel, whose memory grows with the image.
    """
    model.check_streamable()
    check_classifies_images(model)
    if isinstance(model.stem, PixelStem):
        stem_of(model)
    colours = colours_of(model.channels, normalization)
    if len(images.shape) != 4 or images.shape[-1] != colours:
        raise ValueError(f"images have shape {images.shape}; expected {expected_images(colours)}.")
    patch_grid(images.shape[1:3], model.patch)
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
    whole = nnx.merge(graph, variables)
    model, patch = whole.apart(), whole.patch
    b, height, width, _ = images.shape
    state = initial_state(model, b, width)
    rows = height // patch
    state = read_rows(model, state, images, rows=rows, chunk_size=chunk_size, normalization=normalization)
    return read_out(model, state, cols=width // patch)


@singledispatch
def initial_state(model: StreamModel, batch: int, width: int) -> StreamState:
    """Return the state before the first patch of images that are `width` pixels wide."""
    layout = Layout(cols=width // stem_of(model).patch, patches=0, class_token=None)
    return StreamState(
        layers=model.blocks.initial_state(batch, layout),
        patches=jnp.zeros((), jnp.int32),
        sum=jnp.zeros((batch, model.stem.dim), jnp.float32),
        above=stem_of(model).embedding.initial_state(batch, width),
        logits=(
            jnp.zeros((batch, 1, layout.cols, model.readout.num_classes), jnp.float32)
            if model.readout.waits_below
            else None
        ),
    )


@singledispatch
def rows_at_once(model: StreamModel, cols: int, chunk_size: int) -> int:
    """Return how many rows of `cols` patches are read together: of about so many patches, in 2-D a tile or more."""
    return max(chunk_size // cols, model.blocks.reads_rows, 1)


@singledispatch
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
    return _read(model, state, pixels, rows, chunk_size, normalization, keep=False)[0]


def read_dense_rows(
    model: StreamModel,
    state: StreamState,
    pixels: Num[Array, "b H W colours"],
    *,
    rows: int | Int[Array, ""] | None,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> tuple[StreamState, Float[Array, "b H W classes"]]:
    """Read the next rows of patches with a dense model; the arguments are those of `read_rows`.

    Returns:
        The state after these rows, and the logits of as many rows of pixels, float32. Where pixels wait for the row
        below, they begin `Readout.waiting` rows higher, which in front of the first row is above the image.
    """
    first = state.patches == 0
    state, tokens = _read(model, state, pixels, rows, chunk_size, normalization, keep=True)
    assert tokens is not None
    cols = pixels.shape[2] // stem_of(model).patch
    rows_of_tokens = tokens.reshape(tokens.shape[0], -1, cols, tokens.shape[-1])
    logits, last = model.readout.of_next_pixels(rows_of_tokens, state.logits, first)
    return state._replace(logits=last), logits


def _read(
    model: StreamModel,
    state: StreamState,
    pixels: Num[Array, "b H W colours"],
    rows: int | Int[Array, ""] | None,
    chunk_size: int,
    normalization: Normalization | None,
    *,
    keep: bool,
) -> tuple[StreamState, Float[Array, "b n c"] | None]:
    """Return the state after these rows and, where they are to be kept, the last block's tokens of them."""
    stem = stem_of(model)
    arriving, cols = pixels.shape[1] // stem.patch, pixels.shape[2] // stem.patch
    n, before = arriving * cols, state.patches
    if model.blocks.reads_rows or not stem.embedding.reads_patches:
        chunk_size = rows_at_once(model, cols, chunk_size) * cols
    chunk_size = min(chunk_size, n)
    position_embedding = stem.position.lookup(before // cols, (arriving, cols), rows)

    def normalized(pixels: Num[Array, "b H W colours"]) -> Float[Array, "b H W channels"]:
        return pixels if normalization is None else normalize(pixels, *normalization)

    def read_chunk(state: StreamState, start: Array | int, size: int) -> tuple[StreamState, Array | None]:
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
        state = state._replace(layers=layers, patches=state.patches + size, sum=total, above=above)
        return state, tokens if keep else None

    def step(state: StreamState, start: Array) -> tuple[StreamState, Array | None]:
        return read_chunk(state, start, chunk_size)

    chunks, rest = divmod(n, chunk_size)
    state, kept = jax.lax.scan(step, state, chunk_size * jnp.arange(chunks, dtype=jnp.int32))
    tokens = None if kept is None else jnp.moveaxis(kept, 0, 1).reshape(kept.shape[1], -1, kept.shape[-1])
    if rest:
        state, last = read_chunk(state, n - rest, rest)
        if tokens is not None and last is not None:
            tokens = jnp.concatenate([tokens, last], axis=1)
    return state, tokens


@singledispatch
def read_out(model: StreamModel, state: StreamState, *, cols: int) -> Float[Array, "b classes"]:
    """Return logits from what was read so far, of images `cols` patches wide. The state is left as it is.

    The class token comes as if the image ended here.

    Raises:
        ValueError: the model gives logits to each pixel.
    """
    check_classifies_images(model)
    if model.readout.reads == "average":
        return model.readout.logits(state.sum / state.patches)
    token = stem_of(model).class_tokens(state.sum.shape[0])
    layout = Layout(cols=cols, patches=0, class_token="last", start=state.patches)
    token, _ = model.blocks(token, layout, state.layers)
    return model.readout.logits(token[:, 0])


# A pyramid reads strips of its own height, whatever chunk_size is, and the height of the image is no concern of its.


@initial_state.register
def _(model: PyramidStream, batch: int, width: int) -> StreamState:
    return model.initial_state(batch, width)


@rows_at_once.register
def _(model: PyramidStream, cols: int, chunk_size: int) -> int:
    return 1


@read_rows.register
def _(
    model: PyramidStream,
    state: StreamState,
    pixels: Num[Array, "b H W colours"],
    *,
    rows: int | Int[Array, ""] | None,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> StreamState:
    def read(state: StreamState, top: Array) -> tuple[StreamState, None]:
        strip = jax.lax.dynamic_slice_in_dim(pixels, top, model.patch, axis=1)
        return model.read(state, strip if normalization is None else normalize(strip, *normalization)), None

    state, _ = jax.lax.scan(read, state, jnp.arange(0, pixels.shape[1], model.patch, dtype=jnp.int32))
    return state


@read_out.register
def _(model: PyramidStream, state: StreamState, *, cols: int) -> Float[Array, "b classes"]:
    return model.read_out(state, cols=cols)


def check_classifies_images(model: VisionModel | StreamModel) -> None:
    """Check that a model says something of an image as a whole.

    Raises:
        ValueError: it gives logits to each pixel.
    """
    if model.readout.reads in DENSE:
        raise ValueError(
            f"a model with readout={model.readout.reads!r} gives logits to each pixel and none to an image. "
            "`ImageStream.push` returns them row by row, `model(images)` those of whole images."
        )


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
