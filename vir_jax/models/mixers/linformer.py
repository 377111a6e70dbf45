"""Attention to a few learned mixtures of the tokens: Linformer (arXiv 2006.04768), as in Vision X-formers."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer, KeyHeads, from_heads, head_width, to_heads
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.options import check_bool, check_positive
from vir_jax.models.position import resample_position_embedding


class Compression(nnx.Module):
    """A learned matrix E from n tokens to `rank` mixtures of them, a row for each patch and one for the class token.

    Parameters: `patch_kernel [1, rows, cols, r]`, `class_kernel [1, r]`, initially uniform within +-rank^-1/2.
    """

    def __init__(self, layout: Layout, rank: int, *, rngs: nnx.Rngs) -> None:
        uniform = nnx.initializers.uniform(2 * rank**-0.5)

        def init(shape: tuple[int, ...]) -> Array:
            return uniform(rngs.params(), shape, jnp.float32) - rank**-0.5

        axes = (None, None, None, "embed")
        self.patch_kernel = nnx.Param(init((1, *layout.grid, rank)), axes=axes)
        self.class_kernel = nnx.Param(init((1, rank)))

    def matrix(self, layout: Layout) -> Float[Array, "n r"]:
        """Return E for the tokens of an image of any size.

        The patches' rows are resampled on the grid (`resample_patch_kernel`); the class token's stays.
        """
        patches = resample_patch_kernel(self.patch_kernel[...], layout.grid)
        return jnp.concatenate([self.class_kernel[...], patches.reshape(layout.patches, -1)])


def resample_patch_kernel(
    kernel: Float[Array, "1 rows cols r"], grid: tuple[int, int]
) -> Float[Array, "1 new_rows new_cols r"]:
    """Return the patches' rows of E for another grid: resampled, and divided by how many more patches there are.

    So the same picture in more pixels has the same mixtures.
    """
    _, rows, cols, _ = kernel.shape
    return resample_position_embedding(kernel, grid) * (rows * cols / (grid[0] * grid[1]))


@register("linformer")
class Linformer(HeadsMixer):
    """softmax(Q (E^T K)^T / sqrt(d)) (F^T V): every token reads `rank` mixtures of all, the class token mixed in too.

    E and F are each layer's own, and shared by its heads. Where positions are rotary, keys are turned before they are
    mixed; shared values are the keys as they were.

    Parameters: `q.kernel [c, h, d]`, `k.kernel [c, h, d]`, `v.kernel`, without biases; `out`; `key_compression`,
    `value_compression` (`Compression`).

    Args:
        dim: channels.
        heads: of dim / heads channels each.
        layout: of the image size that the model is made for.
        rank: mixtures.
        share_kv: whether the values are the keys, and F is E, as in Vision X-formers.
        one_kv_head: whether all heads read the same keys and values, as in ViL without rotary positions.
        dtype: of the computation.
        rngs: of the parameters.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        layout: Layout,
        *,
        rank: int = 64,
        share_kv: bool = True,
        one_kv_head: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        check_positive("rank", rank)
        check_bool("share_kv", share_kv)
        check_bool("one_kv_head", one_kv_head)
        self.dim, self.heads, self.head_dim, self.rank = dim, heads, head_width(dim, heads), rank
        self.kv_heads = 1 if one_kv_head else heads
        kv_shape = (self.kv_heads, self.head_dim)
        self.q = to_heads(dim, (heads, self.head_dim), bias=False, dtype=dtype, rngs=rngs)
        self.k = to_heads(dim, kv_shape, bias=False, dtype=dtype, rngs=rngs)
        self.v = None if share_kv else to_heads(dim, kv_shape, bias=False, dtype=dtype, rngs=rngs)
        self.out = from_heads((heads, self.head_dim), dim, dtype=dtype, rngs=rngs)
        self.key_compression = Compression(layout, rank, rngs=rngs)
        self.value_compression = None if share_kv else Compression(layout, rank, rngs=rngs)

    def project(self, x: Float[Array, "b n c"]) -> Sequence[Heads]:
        """Compute q, k and v."""
        q, k = (checkpoint_name(project(x), "qkv") for project in (self.q, self.k))
        return q, k, k if self.v is None else checkpoint_name(self.v(x), "qkv")

    def mix(
        self, q: Heads, k: KeyHeads, v: KeyHeads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """Attend from every token to the mixtures; the softmax is in float32."""
        e = self.key_compression.matrix(layout).astype(k.dtype)
        f = e if self.value_compression is None else self.value_compression.matrix(layout).astype(v.dtype)
        keys, values = (jnp.einsum("nr,bnhd->brhd", matrix, x) for matrix, x in ((e, k), (f, v)))
        return jax.nn.dot_product_attention(q, keys, values), None

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count the projections, the mixtures of keys and values, and attention to them."""
        self.check_call(mode, None, False)
        kv_dim = self.kv_heads * self.head_dim
        projections = 2 * self.dim**2 + (1 if self.v is None else 2) * self.dim * kv_dim
        return layout.length * (projections + 2 * self.rank * kv_dim + 2 * self.rank * self.dim)
