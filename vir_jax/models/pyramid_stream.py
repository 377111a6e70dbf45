"""A pyramid that reads an image strip by strip: line buffers for its convolutions, states for its mixers.

A strip is as high as the pyramid's whole stride: one row of tokens of the last stage. A convolution keeps the last rows
that it read. One of stride 1 looks down, too: it gives a row when it has read the next, so that its rows lag by one
behind what it reads. The lags add up, and are rounded up to whole strips before the first stage of mixers. That begins
to read when the first strip has come through, and stays `delay` rows of pixels behind the image; where the image ends,
strips of zeros push the last ones through. What it reads is what it reads of the whole image.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from vir_jax.models.conv_stage import WINDOW, Conv, ConvBlock, ConvNorm, PyramidStem
from vir_jax.models.layers import gelu
from vir_jax.models.layout import Layout
from vir_jax.models.mixers import State
from vir_jax.models.model import StreamModel
from vir_jax.models.readout import Readout
from vir_jax.models.stage import BlocksApart
from vir_jax.models.stream_state import StreamState

Rows = Float[Array, "b _ _ _"]
Buffers = tuple[Float32[Array, "_ _ _ _"], ...]

# More strips than an image has, of which rows can still be counted.
NO_END = 2**24
SIDES = ((0, 0), (1, 1))
"""Padding of rows that stand below others: at their sides alone."""


class Passage:
    """One strip on its way through convolutions, each of which adds the rows that it kept above.

    Args:
        before: what the strip before left, in the order of use; None: there was none, zeros stand above.
        strip: its number, from 0.
        strips: in the image; rows beyond are zeros, as the convolutions of the whole image see them.
        height: rows of the strip.
    """

    def __init__(
        self, before: Buffers | None, strip: Int[Array, ""], strips: int | Int[Array, ""], height: int
    ) -> None:
        self.before: Iterator[Array] | None = None if before is None else iter(before)
        self.left: list[Array] = []
        self.strip, self.strips = strip, strips
        self.height, self.lag = height, 0

    def below(self, x: Rows, rows: int) -> Rows:
        """Return rows of this strip below the last ones of the strip before, and keep the last ones of this."""
        zeros = (x.shape[0], rows, *x.shape[2:])
        above = jnp.zeros(zeros, jnp.float32) if self.before is None else next(self.before)
        x = jnp.concatenate([above, x], axis=1)
        self.left.append(x[:, -rows:])
        return x

    def convolve(self, conv: ConvNorm | Conv, x: Rows) -> Rows:
        """Return the rows of a convolution that can be computed by now, as many as it has of a strip, float32."""
        return self._convolve(conv, self.below(x, WINDOW - conv.stride))

    def block(self, block: ConvBlock, x: Rows) -> Rows:
        """Return the rows of a block."""
        below = self.below(x, WINDOW - 1)
        hidden = self.inside(gelu(self._convolve(block.conv1, below)))
        # Both convolutions lag by a row: the residual's rows are those that were kept, and all but the last of these.
        return self.inside(below[:, : x.shape[1]] + self.convolve(block.conv2, hidden))

    def wait(self, x: Rows, multiple: int) -> Rows:
        """Return rows that lag by a multiple of so many."""
        rows = -self.lag % multiple
        if not rows:
            return x
        self.lag += rows
        return self.below(x, rows)[:, : x.shape[1]]

    def inside(self, x: Rows) -> Rows:
        """Return rows of the image as they are, and zeros for those above and below it."""
        row = self.strip * self.height - self.lag + jnp.arange(x.shape[1], dtype=jnp.int32)
        inside = (row >= 0) & (row < self.strips * self.height)
        return jnp.where(inside[:, None, None], x, 0.0)

    def _convolve(self, conv: ConvNorm | Conv, x: Rows) -> Rows:
        if conv.stride == 1:
            self.lag += 1
        else:
            assert self.lag % conv.stride == 0, "the centres of the windows are on even rows"
            self.lag, self.height = self.lag // conv.stride, self.height // conv.stride
        return conv(x, padding=SIDES).astype(jnp.float32)


class PyramidStream(StreamModel):
    """A pyramid that reads an image in strips: `Pyramid.apart` makes it.

    Args:
        stem: of the pyramid.
        convolutions: of each convolutional stage its blocks, and the convolution after it.
        stages: those with mixers.
        between: the convolutions between these.
        readout: of the pyramid.
        patch: rows of pixels in a strip.
    """

    stem: PyramidStem  # type: ignore[assignment] # All that reads patches of it is overridden.

    def __init__(
        self,
        *,
        stem: PyramidStem,
        convolutions: Sequence[tuple[Sequence[ConvBlock], Conv]],
        stages: Sequence[BlocksApart],
        between: Sequence[Conv],
        readout: Readout,
        patch: int,
    ) -> None:
        self.stem, self.readout, self.patch = stem, readout, patch
        self.convolutions = nnx.List(nnx.List(blocks) for blocks, _ in convolutions)
        self.halving = nnx.List(halving for _, halving in convolutions)
        self.blocks, *further = stages
        self.further, self.between = nnx.List(further), nnx.List(between)

    def initial_state(self, batch: int, width: int) -> StreamState:
        """Return the state before the first strip of images that are `width` pixels wide, a multiple of `patch`."""
        tokens, lines, _ = self._shapes(batch, width)
        cols, between = tokens.shape[2], []
        layers: list[State] = []
        for stage, conv in zip((self.blocks, *self.further), (*self.between, None), strict=True):
            layers += stage.initial_state(batch, Layout(cols=cols, patches=0, class_token=None))
            if conv is not None:
                between.append(jnp.zeros((batch, 1, cols, conv.kernel.shape[2]), jnp.float32))
                cols //= 2
        return StreamState(
            layers=tuple(layers),
            patches=jnp.zeros((), jnp.int32),
            sum=jnp.zeros((batch, self.readout.head.in_features), jnp.float32),
            above=(*(jnp.zeros(line.shape, jnp.float32) for line in lines), *between),
        )

    def delay(self, width: int) -> int:
        """Return by how many rows of pixels the mixers lag behind the image."""
        return self.patch * self._shapes(1, width)[2]

    def read(
        self,
        state: StreamState,
        pixels: Float[Array, "b H W channels"],
        strips: int | Int[Array, ""] = NO_END,
    ) -> StreamState:
        """Read the next strip.

        Args:
            state: after all strips above.
            pixels: of the strip, normalised; zeros below the image's end.
            strips: in the image, where it has ended.
        """
        cols = pixels.shape[2] // self.patch
        strip, count = state.patches // cols, len(state.above) - len(self.between)
        maps, lines, lag = self._convolved(pixels.astype(jnp.float32), state.above[:count], strip, strips)
        mixed = state.layers, state.above[count:], state.sum
        # What the first strips give is above the image.
        layers, between, total = jax.lax.cond(
            strip >= lag, lambda mixed: self._mix(maps, strip - lag, *mixed), lambda mixed: mixed, mixed
        )
        return StreamState(layers, state.patches + cols, total, (*lines, *between))

    def read_out(self, state: StreamState, *, cols: int) -> Float[Array, "b classes"]:
        """Return the logits of the strips read so far, as if the image ended here; the state is left as it is.

        Args:
            state: after one strip at least.
            cols: tokens of the last stage in a row.
        """
        patches = state.patches
        nothing = jnp.zeros(
            (state.sum.shape[0], self.patch, cols * self.patch, self.stem.channels), jnp.float32
        )
        for _ in range(self._shapes(1, cols * self.patch)[2]):
            state = self.read(state, nothing, patches // cols)
        return self.readout.logits(state.sum / patches)

    def _shapes(self, batch: int, width: int) -> tuple[Any, tuple[Any, ...], int]:
        """Return the shapes of what `_convolved` gives, and by how many strips it lags."""
        strip, lags = jax.ShapeDtypeStruct((batch, self.patch, width, self.stem.channels), jnp.float32), []

        def of(x: Array) -> tuple[Rows, Buffers]:
            maps, lines, lag = self._convolved(x, None, jnp.int32(0), NO_END)
            lags.append(lag)
            return maps, lines

        return *jax.eval_shape(of, strip), lags[0]

    def _convolved(
        self,
        pixels: Float[Array, "b H W channels"],
        lines: Buffers | None,
        strip: Int[Array, ""],
        strips: int | Int[Array, ""],
    ) -> tuple[Rows, Buffers, int]:
        """Return the first mixers' tokens of an earlier strip, the lines that are kept, and how much earlier it is."""
        way = Passage(lines, strip, strips, self.patch)
        x = pixels
        for conv in (self.stem.conv1, self.stem.conv2):
            x = way.inside(nnx.relu(way.convolve(conv, x)))
        last = len(self.halving) - 1
        for i, (blocks, halving) in enumerate(zip(self.convolutions, self.halving, strict=True)):
            for block in blocks:
                x = way.block(block, x)
            # Whole strips, where mixers follow.
            x = way.wait(x, way.height if i == last else halving.stride)
            x = way.inside(way.convolve(halving, x))
        return x, tuple(way.left), way.lag // way.height

    def _mix(
        self,
        maps: Rows,
        strip: Int[Array, ""],
        states: tuple[State, ...],
        between: Buffers,
        total: Float[Array, "b c"],
    ) -> tuple[tuple[State, ...], Buffers, Float[Array, "b c"]]:
        """Mix the tokens of a strip: the states after it, the rows that are kept, and the sum with the last tokens."""
        x, kept, ends = maps, [], (*self.between, None)
        after: list[State] = []
        for i, stage in enumerate((self.blocks, *self.further)):
            b, rows, cols, c = x.shape
            layout = Layout(cols=cols, patches=rows * cols, class_token=None, start=strip * rows * cols)
            own = states[len(after) : len(after) + len(stage.blocks)]
            tokens, own = stage(x.reshape(b, rows * cols, c), layout, own)
            after += own
            x, conv = tokens.reshape(x.shape), ends[i]
            if conv is not None:
                x = jnp.concatenate([between[i], x], axis=1)
                kept.append(x[:, -1:])
                x = conv(x, padding=SIDES).astype(jnp.float32)
        return tuple(after), tuple(kept), total + jnp.sum(x, axis=(1, 2))
