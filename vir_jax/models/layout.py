"""Where every token of a sequence stands: made once by the stem, cut with the tokens."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

ClassTokenPlace = Literal["first", "last"]
"""Of the class token: before all patches, or after them."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of an image stand, or those of a piece of it.

    Patches come in row-major order. A second pass, where there is one, is the same patches backwards: [p1..pN, pN..p1].
    A class token comes before or after all patches.

    Attributes:
        cols: patches in a row of the image.
        patches: how many of them this piece has, in one pass; 0 where the class token comes alone.
        class_token: "first", "last", or None where this piece has none.
        passes: 1, or 2 where the patches come a second time, backwards.
        start: row-major index of the piece's first patch in the image; may be traced.
    """

    cols: int = dataclasses.field(metadata={"static": True})
    patches: int = dataclasses.field(metadata={"static": True})
    class_token: ClassTokenPlace | None = dataclasses.field(metadata={"static": True})
    passes: int = dataclasses.field(default=1, metadata={"static": True})
    start: int | Int[Array, ""] = 0

    @property
    def length(self) -> int:
        """Tokens in this piece."""
        return self.passes * self.patches + (self.class_token is not None)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the piece's patches.

        Raises:
            ValueError: the piece does not consist of whole rows.
        """
        if self.patches % self.cols:
            raise ValueError(
                f"{self.patches} patches are no whole rows of {self.cols}; a mixer that counts rows reads whole rows"
            )
        return self.patches // self.cols, self.cols

    @property
    def positions(self) -> tuple[Int[Array, " p"], Int[Array, " p"]]:
        """(row, column) in the image of each patch of the first pass."""
        index = jnp.asarray(self.start, jnp.int32) + jnp.arange(self.patches, dtype=jnp.int32)
        return index // self.cols, index % self.cols

    @property
    def order(self) -> Int[Array, " n"]:
        """Index of each token, the class token too, in the sequence of the whole image."""
        return jnp.asarray(self.start, jnp.int32) + jnp.arange(self.length, dtype=jnp.int32)

    @property
    def places(self) -> tuple[Int[Array, " n"], Int[Array, " n"]]:
        """(row, column) of each token, the class token too, and of the patches of a second pass again.

        A last class token stands below the last patch, in the last column, as for 2-D retention; a first one above the
        first patch.
        """
        y, x = self.positions
        if self.passes == 2:
            y, x = (jnp.concatenate([line, line[::-1]]) for line in (y, x))
        if self.class_token == "first":
            return jnp.insert(y, 0, -1), jnp.insert(x, 0, 0)
        if self.class_token == "last":
            end = jnp.asarray(self.start, jnp.int32) + self.patches
            return jnp.append(y, (end + self.cols - 1) // self.cols), jnp.append(x, self.cols - 1)
        return y, x

    def patch_tokens(self, x: Float[Array, "b n c"]) -> Float[Array, "b p c"]:
        """Return the tokens of the patches, of both passes where there are two, without the class token."""
        first = int(self.class_token == "first")
        return x[:, first : first + self.passes * self.patches]

    def patch_map(self, x: Float[Array, "b n c"]) -> Float[Array, "b rows cols c"]:
        """Return the patches' tokens at their places in the image, without the class token.

        Of two passes those of the second, which has read the whole image, in image order.
        """
        tokens = self.patch_tokens(x)
        if self.passes == 2:
            tokens = jnp.flip(tokens[:, self.patches :], axis=1)
        return tokens.reshape(x.shape[0], *self.grid, x.shape[-1])

    def backwards(self, x: Float[Array, "b n *c"]) -> Float[Array, "b n *c"]:
        """Return the tokens of one pass with the patches in reverse order; a class token stays where it is."""
        return self._change_patches(x, lambda patches: jnp.flip(patches, axis=1))

    def upside_down(self, x: Float[Array, "b n *c"]) -> Float[Array, "b n *c"]:
        """Return the tokens of one pass with the rows of patches in reverse order, each of them as it was.

        Raises:
            ValueError: the piece does not consist of whole rows.
        """

        def turn(patches: Array) -> Array:
            rows = patches.reshape(len(x), *self.grid, *x.shape[2:])
            return jnp.flip(rows, axis=1).reshape(patches.shape)

        return self._change_patches(x, turn)

    def _change_patches(
        self, x: Float[Array, "b n *c"], change: Callable[[Array], Array]
    ) -> Float[Array, "b n *c"]:
        """Return the tokens of one pass with the patches changed; a class token stays where it is."""
        first = int(self.class_token == "first")
        before, patches, after = jnp.split(x, (first, first + self.patches), axis=1)
        return jnp.concatenate([before, change(patches), after], axis=1)

    def piece(
        self, start: int | Int[Array, ""], patches: int, *, class_token: ClassTokenPlace | None = None
    ) -> "Layout":
        """Return the layout of `patches` patches of this image from patch `start` on."""
        return dataclasses.replace(self, start=start, patches=patches, class_token=class_token)
