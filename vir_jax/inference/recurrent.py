"""Recurrent inference: all layers inside one loop over the patches, one state per layer (PAPER.md section 3).

A chunk of patches is embedded, goes through every block, and leaves its mark on the blocks' states; its activations
are then forgotten. So memory depends on the chunk and, but for the pixels themselves, not on the image. What comes out
is what the model computes from the whole image in any other mode.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int, Num

from vir_jax.models import VisionBackbone
from vir_jax.models.backbone import Block, Readout, patch_grid
from vir_jax.models.mixers import Retention, Retention2D
from vir_jax.models.position import resampling_weights, sincos_position_embedding
from vir_jax.training.mixing import normalize

# Patches read at a time: enough for the matrix products to be efficient.
CHUNK_SIZE = 512

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the colours in [0, 1]."""


class StreamState(NamedTuple):
    """All that is remembered of the patches read so far."""

    layers: tuple[Float32[Array, "b ..."], ...]
    """Of each block, the state of its retention: [b, h, d, d], or one per column in 2-D: [b, h, cols, d, d]."""
    patches: Int[Array, ""]
    """How many there were."""
    readout: Float32[Array, "b c"]
    """For the readout "average" the sum of the last block's tokens, for "first" the first of them, else zero."""


def stream(
    model: VisionBackbone,
    images: Num[Array, "b H W 3"] | Num[np.ndarray, "b H W 3"],
    *,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> Float[Array, "b classes"]:
    """Classify images in memory that does not grow with them: `model(images)`, computed recurrently.

    Args:
        model: a ViR, 1-D or 2-D, that reads the image once.
        images: normalised pixels; or uint8, which are normalised chunk by chunk and take a quarter of the memory.
        chunk_size: patches read at a time. In 2-D, whole rows of about so many patches.
        normalization: (mean, std) of the colours in [0, 1] for uint8 images.

    Returns:
        Logits, float32.

    Raises:
        ValueError: for a model that cannot be computed so, or images that do not divide into patches.
    """
    check_streamable(model)
    if len(images.shape) != 4 or images.shape[-1] != 3:
        raise ValueError(f"images have shape {images.shape}; expected [b, H, W, 3], a batch of RGB images.")
    patch_grid(images.shape[1:3], model.patch)
    check_pixels(images.dtype, normalization)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; expected at least 1")
    graph, params = nnx.split(model)
    return _stream(graph, params, images, normalization, chunk_size)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _stream(
    graph: nnx.GraphDef[VisionBackbone],
    params: Any,
    images: Num[Array, "b H W 3"],
    normalization: Normalization | None,
    chunk_size: int,
) -> Float[Array, "b classes"]:
    model = nnx.merge(graph, params)
    b, height, width, _ = images.shape
    state = initial_state(model, b, width)
    rows = height // model.patch
    state = read_rows(model, state, images, rows=rows, chunk_size=chunk_size, normalization=normalization)
    return read_out(model, state)


def initial_state(model: VisionBackbone, batch: int, width: int) -> StreamState:
    """The state before the first patch of images that are `width` pixels wide."""
    mixer = model.blocks.mixer
    columns = (width // model.patch,) if isinstance(mixer, Retention2D) else ()
    shape = (batch, mixer.heads, *columns, mixer.head_dim, mixer.head_dim)
    return StreamState(
        layers=tuple(jnp.zeros(shape, jnp.float32) for _ in range(model.depth)),
        patches=jnp.zeros((), jnp.int32),
        readout=jnp.zeros((batch, model.dim), jnp.float32),
    )


def read_rows(
    model: VisionBackbone,
    state: StreamState,
    pixels: Num[Array, "b H W 3"],
    *,
    rows: int | Int[Array, ""] | None,
    chunk_size: int = CHUNK_SIZE,
    normalization: Normalization | None = None,
) -> StreamState:
    """Read the next rows of patches.

    Args:
        model: as for `stream`.
        state: after all rows above.
        pixels: whole rows of patches, any number of them.
        rows: of patches in the whole image, for which learned position embeddings are resampled.
        chunk_size: as for `stream`.
        normalization: as for `stream`.

    Returns:
        The state after these rows.
    """
    p = model.patch
    arriving, cols = pixels.shape[1] // p, pixels.shape[2] // p
    n = arriving * cols
    if isinstance(model.blocks.mixer, Retention2D):
        chunk_size = max(chunk_size // cols, 1) * cols
    chunk_size = min(chunk_size, n)
    position_embedding = _position_embedding(model, state.patches // cols, (arriving, cols), rows)
    blocks = _blocks(model)

    def read_chunk(state: StreamState, start: Array | int, size: int) -> StreamState:
        y, x = jnp.divmod(start + jnp.arange(size, dtype=jnp.int32), cols)
        patches = _patches(pixels, y, x, p)
        if normalization is not None:
            patches = normalize(patches, *normalization)
        embedded = model.patch_embedding(patches).astype(jnp.float32)
        tokens = embedded.reshape(-1, size, model.dim) + position_embedding(y, x)
        return _read_tokens(model.readout, blocks, state, tokens, cols)

    def step(state: StreamState, start: Array) -> tuple[StreamState, None]:
        return read_chunk(state, start, chunk_size), None

    chunks, rest = divmod(n, chunk_size)
    state, _ = jax.lax.scan(step, state, chunk_size * jnp.arange(chunks, dtype=jnp.int32))
    return read_chunk(state, n - rest, rest) if rest else state


def read_out(model: VisionBackbone, state: StreamState) -> Float[Array, "b classes"]:
    """Logits from what was read so far: of an image that ended here. The state is left as it is."""
    match model.readout:
        case "last":
            token = _class_token(model, state)
        case "average":
            token = state.readout / state.patches
        case "first":
            token = state.readout
    return model.head(model.final_norm(token))


def check_streamable(model: VisionBackbone) -> None:
    """Whether a model can be computed in one pass over the patches.

    Raises:
        ValueError: it cannot, and why.
    """
    mixer = model.blocks.mixer
    if not isinstance(mixer, Retention | Retention2D):
        raise ValueError(
            f"a model of {type(mixer).__name__} cannot be streamed: it has no state that summarises earlier patches. "
            "Use a vir_* model, or give this one the whole image."
        )
    if model.bidirectional:
        raise ValueError(
            "a bidirectional model cannot be streamed: it reads the patches a second time, backwards from the last. "
            "Use one made with bidirectional=False, or give this one the whole image with mode='chunkwise'."
        )


def check_pixels(dtype: Any, normalization: Normalization | None) -> None:
    """Whether pixels are uint8 and come with their normalisation, or are floating point and do not.

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


def _patches(
    pixels: Num[Array, "b H W 3"], y: Int[Array, "n"], x: Int[Array, "n"], p: int
) -> Num[Array, "b*n p p 3"]:
    """The patches in rows y and columns x of the grid, those of one image together."""
    size, zero = (pixels.shape[0], p, p, 3), jnp.int32(0)
    cut = jax.vmap(lambda y, x: jax.lax.dynamic_slice(pixels, (zero, y * p, x * p, zero), size), out_axes=1)
    return cut(y, x).reshape(-1, p, p, 3)


def _position_embedding(
    model: VisionBackbone,
    first_row: Int[Array, ""],
    grid: tuple[int, int],
    rows: int | Int[Array, ""] | None,
) -> Callable[[Int[Array, "n"], Int[Array, "n"]], Float[Array, "n c"]]:
    """A function of the patches' rows and columns in `grid`, which begins in row `first_row` of the image."""
    if model.position == "sincos":
        return lambda y, x: sincos_position_embedding(first_row + y, x, model.dim)
    if rows is None:
        raise ValueError(
            "learned position embeddings are resampled to the whole image's grid, so its height must be known before "
            "the first row is read. Give it, or use a model made with position='sincos'."
        )
    (arriving, cols), (own_rows, own_cols) = grid, model.grid
    by_row = resampling_weights(own_rows, rows, start=first_row, count=arriving)
    by_col = resampling_weights(own_cols, cols, count=cols)
    embedding = model.position_embedding[...][0]

    def resampled(y: Int[Array, "n"], x: Int[Array, "n"]) -> Float[Array, "n c"]:
        return jnp.einsum(
            "ni,nj,ijc->nc", by_row[y], by_col[x], embedding, precision=jax.lax.Precision.HIGHEST
        )

    return resampled


def _read_tokens(
    readout_token: Readout, blocks: Sequence[Block], state: StreamState, x: Float[Array, "b n c"], cols: int
) -> StreamState:
    """Pass the next tokens through all blocks; in 2-D they are whole rows."""
    first = state.patches == 0
    x, layers = _through_blocks(blocks, state, x, grid=(x.shape[1] // cols, cols))
    match readout_token:
        case "last":
            readout = state.readout
        case "average":
            readout = state.readout + jnp.sum(x, axis=1)
        case "first":
            readout = jnp.where(first, x[:, 0], state.readout)
    return StreamState(layers, state.patches + x.shape[1], readout)


def _class_token(model: VisionBackbone, state: StreamState) -> Float[Array, "b c"]:
    """The class token after the last block, as if it came now."""
    token = jnp.broadcast_to(model.class_token[...], (state.readout.shape[0], 1, model.dim))
    cols = state.layers[0].shape[2] if isinstance(model.blocks.mixer, Retention2D) else 1
    token, _ = _through_blocks(_blocks(model), state, token, grid=(0, cols))
    return token[:, 0]


def _blocks(model: VisionBackbone) -> list[Block]:
    """Each by itself. Taken apart before the loop over chunks, for within it they would be copied for every chunk."""
    return [model.block(index) for index in range(model.depth)]


def _through_blocks(
    blocks: Sequence[Block], state: StreamState, x: Float[Array, "b n c"], *, grid: tuple[int, int]
) -> tuple[Float[Array, "b n c"], tuple[Any, ...]]:
    layers = []
    for block, before in zip(blocks, state.layers, strict=True):
        x, after, _ = block(x, mode="auto", grid=grid, initial_state=before, return_state=True)
        layers.append(after)
    return x, tuple(layers)
