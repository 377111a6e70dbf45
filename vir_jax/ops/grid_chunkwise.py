"""Retention over a grid, chunkwise form: parallel inside a tile of rows and columns, recurrent from tile to tile.

A tile of R rows and C columns that begins at (y0, x0) needs what is above it, a state for each of its columns, and what
is left of it, a state for each of its rows. With S the state of docs/method.md, section 2, row i and column j get

    o = [((Q K^T) .* D) V]_ij + gamma^(i+1) q S[y0-1, x0+j] + gamma^(j+1) q L[y0+i],
    L[y0+i] = sum over rows y0 .. y0+i and columns x < x0 of gamma^(y0+i-y) gamma^(x0-1-x) k^T v,

D being a Kronecker product of the masks of its rows and columns. So a token reads and writes 1/R + 1/C of a state,
where row after row it would be one of each column. Bands of R rows come one after the other, and in each its tiles.
Ragged bands and tiles are padded with tokens of zero at their ends, where nothing follows that could see them decay.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Shaped

from vir_jax.ops.contract import contract, empty_state, matmul_precision
from vir_jax.ops.decay import decay_between_2d, decay_power, grid_positions
from vir_jax.ops.grid_state import along_columns, between_columns, empty_grid_state
from vir_jax.ops.storage import from_bits, to_bits

Patches = Float[Array, "b y x h _"]
StoredPatches = Shaped[Array, "b y x h _"]  # `to_bits`
States = Float32[Array, "b h x d e"]


class _Carry(NamedTuple):
    """What goes from tile to tile of a band."""

    left: Float32[Array, "b h y d e"]
    """L of the tile before, in each row."""
    below_left: Float32[Array, "b h d e"]
    """What the band adds to the state behind it of the tile's last column."""
    states: States
    """Those above the band; up to this tile, those behind it."""
    out: StoredPatches


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    tile_size: tuple[int, int],
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"] | None]:
    """Scan over bands and tiles of at most `tile_size` (rows, columns). See `gradient` and `grid_parallel` besides."""
    if reverse:
        q, k, v = (jnp.flip(x, axis=1) for x in (q, k, v))
        states = None if arriving is None else along_columns(jnp.flip(arriving, axis=2), log_decay)
        out, final = _onward(q, k, v, log_decay, states, grid, tile_size, decay_late=True)
        own = jnp.flip(between_columns(final, log_decay), axis=2) if with_final else None
        return jnp.flip(out, axis=1), own
    out, final = _onward(q, k, v, log_decay, arriving, grid, tile_size, decay_late=False)
    return out, final if with_final else None


def _onward(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: States | None,
    grid: tuple[int, int],
    tile_size: tuple[int, int],
    *,
    decay_late: bool,
) -> tuple[Float[Array, "b n h e"], States]:
    """Compute the form forward in time; `decay_late`: states have decayed when they leave, not as they arrive."""
    (rows, cols), (b, n, h, e) = grid, v.shape
    (bands, height), (tiles, width) = _even(rows, tile_size[0]), _even(cols, tile_size[1])
    padding = (0, 0), (0, bands * height - rows), (0, tiles * width - cols), (0, 0), (0, 0)
    states = empty_grid_state(k, v, cols) if arriving is None else arriving
    states = jnp.pad(states, ((0, 0), (0, 0), padding[2], (0, 0), (0, 0)))
    q, k, v = (jnp.pad(x.reshape(b, rows, cols, h, -1), padding) for x in (q, k, v))
    one_band = partial(_band, q, k, v, log_decay, size=(height, width), rows=rows, decay_late=decay_late)

    def step(carry: tuple[Array, Array], first_row: Array) -> tuple[tuple[Array, Array], None]:
        return one_band(*carry, first_row), None

    # The output begins as v, all of which is overwritten: it has the shape, the dtype and the devices it needs.
    (states, out), _ = jax.lax.scan(step, (states, to_bits(v)), height * jnp.arange(bands, dtype=jnp.int32))
    out = from_bits(out, v.dtype)
    return out[:, :rows, :cols].reshape(b, n, h, e), states[:, :, :cols]


def _even(length: int, at_most: int) -> tuple[int, int]:
    """Return into how many parts of at most so many a length is cut, and the length of all but the last of them."""
    parts = -(-length // at_most)
    return parts, -(-length // parts)


def _band(
    q: Patches,
    k: Patches,
    v: Patches,
    log_decay: Float32[Array, "h"],
    states: States,
    out: StoredPatches,
    first_row: Array,
    *,
    size: tuple[int, int],
    rows: int,
    decay_late: bool,
) -> tuple[States, StoredPatches]:
    """Read the band from `first_row` on: the states behind it, and the output."""
    (height, width), tiles = size, q.shape[2] // size[1]
    precision = matmul_precision(q, k, v)
    y, x = (jnp.arange(length, dtype=jnp.int32) for length in size)
    at_row, at_col = decay_power(log_decay, y if decay_late else y + 1), decay_power(log_decay, x + 1)
    to_next_col = decay_power(log_decay, width - 1 - x)
    past_tile = decay_power(log_decay, jnp.int32(width))[:, None, None, None]
    band_rows = jnp.minimum(height, rows - first_row)
    from_row = decay_power(log_decay, (band_rows if decay_late else band_rows - 1) - y)
    past_band = decay_power(log_decay, band_rows)[:, None, None, None]
    position = grid_positions(size)
    mask = decay_between_2d(log_decay, position, position)

    # Of all tiles at once, and before the loop that overwrites them: a read within it would make XLA copy them.
    band_q = jax.lax.dynamic_slice_in_dim(q, first_row, height, axis=1)
    from_above = contract("bhxyd,bhxde->bhxye", jnp.transpose(band_q, (0, 3, 2, 1, 4)), states, precision)

    def corner(tile: Array) -> tuple[Array, ...]:
        none = jnp.int32(0)
        return none, first_row, tile * width, none, none

    def read_tile(carry: _Carry, tile: Array) -> tuple[_Carry, None]:
        def cut(patches: Patches, tile: Array, *axes: str) -> Array:
            b, _, _, *rest = patches.shape
            part = jax.lax.dynamic_slice(patches, corner(tile), (b, height, width, *rest))
            return jnp.transpose(part, ["byxhc".index(axis) for axis in axes])

        def tokens(part: Float[Array, "b h y x c"]) -> Float[Array, "b h n c"]:
            return part.reshape(*part.shape[:2], height * width, -1)

        # The tile before is taken up here and not there, so that its L is dead then, and overwritten in place.
        left_k = cut(k, tile - 1, *"bhycx") * jnp.where(tile > 0, to_next_col, 0.0)[:, None, None, :]
        left_own = contract("bhydx,bhyxe->bhyde", left_k, cut(v, tile - 1, *"bhyxc"), precision)
        left = past_tile * carry.left + along_columns(left_own, log_decay)

        rows_q, rows_k, rows_v = (cut(patches, tile, *"bhyxc") for patches in (q, k, v))
        scores = contract("bhnd,bhmd->bhnm", tokens(rows_q), tokens(rows_k), precision) * mask
        here = contract("bhnm,bhme->bhne", scores, tokens(rows_v), precision)
        here = here.reshape(*rows_q.shape[:-1], -1)
        here += contract("bhyxd,bhyde->bhyxe", rows_q, left, precision) * at_col[:, None, :, None]
        above = jax.lax.dynamic_slice_in_dim(from_above, tile * width, width, axis=2)
        here += jnp.swapaxes(above, 2, 3) * at_row[:, :, None, None]
        here = jnp.transpose(here, (0, 2, 3, 1, 4)).astype(v.dtype)

        below_k = cut(k, tile, *"bhxcy") * from_row[:, None, None, :]
        below_own = contract("bhxdy,bhxye->bhxde", below_k, cut(v, tile, *"bhxyc"), precision)
        below = along_columns(below_own, log_decay, before=carry.below_left)
        part = jax.lax.dynamic_slice_in_dim(carry.states, tile * width, width, axis=2)
        states = jax.lax.dynamic_update_slice_in_dim(
            carry.states, past_band * part + below, tile * width, axis=2
        )
        out = jax.lax.dynamic_update_slice(carry.out, to_bits(here), corner(tile))
        return _Carry(left, below[:, :, -1], states, out), None

    k_flat, v_flat = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    start = _Carry(empty_grid_state(k_flat, v_flat, height), empty_state(k_flat, v_flat), states, out)
    end, _ = jax.lax.scan(read_tile, start, jnp.arange(tiles, dtype=jnp.int32))
    return end.states, end.out
