"""Retention, ViR's mixer, along the raster order or by rows and columns."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.sharding import on_each_device
from vir_jax.ops import MODES, retention, retention_2d, vir_log_decay
from vir_jax.ops.kernels import PLATFORMS as KERNELS
from vir_jax.ops.sequence import CHUNK_SIZE

# Dimensions of heads' tokens, of decays and of a 1-D state; see `on_each_device`.
HEADS, DECAYS, STATE = ("batch", None, "heads", None), ("heads",), ("batch", "heads", None, None)


@register("retention")
class Retention(HeadsMixer):
    """Retention with ViR's fixed decays (docs/method.md, sections 1 and 2).

    The state is `[b, h, d, d]` in 1-D, `[b, h, cols, d, d]` in 2-D, float32.

    Args:
        dim: channels.
        heads: of dim / heads channels each.
        layout: of the image size that the model is made for.
        retention: "1d" decays along the sequence, "2d" by rows and columns. None: "1d".
        chunk_size: tokens in a chunk, 1-D alone, in the mode "chunkwise", and in "auto", which is then chunkwise. None:
            the operator's choice.
        implementation: "xla", or a kernel of `vir_jax.ops.kernels` for the chunkwise mode of 1-D. None: "xla". A kernel
            runs on each device of the mesh in context (`jax.set_mesh`), batch and heads split as everywhere; a mesh
            that does not divide them, or has other axes, is an error then.
        dtype: of the computation.
        rngs: of the parameters.

    Raises:
        ValueError: an unknown value, or options that make no sense together.
    """

    causal = True

    def __init__(
        self,
        dim: int,
        heads: int,
        layout: Layout,
        *,
        retention: str | None = None,
        chunk_size: int | None = None,
        implementation: str | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        if retention not in (None, "1d", "2d"):
            raise ValueError(f"retention={retention!r}; expected '1d', '2d' or None.")
        known = (None, "xla", *KERNELS)
        if implementation not in known:
            raise ValueError(f"implementation={implementation!r}; expected one of {known}.")
        if chunk_size is not None and (type(chunk_size) is not int or chunk_size < 1):
            raise ValueError(f"chunk_size={chunk_size!r}; expected a positive number of tokens, or None.")
        kernel = implementation in KERNELS
        if retention == "2d" and layout.passes == 2:
            raise ValueError(
                "bidirectional=True makes no sense with retention='2d': the flipped patches continue a sequence, "
                "and the 2-D mask is defined on one grid of patches. Choose one of the two."
            )
        if retention == "2d" and chunk_size is not None:
            raise ValueError(
                f"chunk_size={chunk_size} makes no sense with retention='2d': its chunks are whole rows of the "
                "grid. Leave it out."
            )
        if retention == "2d" and kernel:
            raise ValueError(
                f"implementation={implementation!r} makes no sense with retention='2d': there are kernels for 1-D "
                "retention alone. Leave it out."
            )
        if chunk_size is not None and kernel:
            raise ValueError(
                f"chunk_size={chunk_size} makes no sense with implementation={implementation!r}, which computes in "
                "chunks of its own. Leave it out."
            )
        super().__init__(dim, heads, layout, dtype=dtype, rngs=rngs)
        self.retention = "2d" if retention == "2d" else "1d"
        self.reads_rows = self.retention == "2d"
        self.chunk_size, self.implementation = chunk_size, implementation
        self.modes = ("chunkwise",) if kernel else MODES

    @property
    def log_decay(self) -> Float32[Array, " h"]:
        """log(gamma) of each head, the same in every layer."""
        return vir_log_decay(self.heads)

    def mix(
        self, q: Heads, k: Heads, v: Heads, layout: Layout, *, mode: str, state: State | None
    ) -> tuple[Heads, State | None]:
        """O = (Q K^T .* D) V, or one of its equal forms."""
        if self.retention == "2d":
            return retention_2d(q, k, v, self.log_decay, grid=layout.grid, mode=mode, initial_state=state)
        chunk_size = self.chunk_size if mode in ("auto", "chunkwise") else None
        operator = partial(retention, mode=mode, chunk_size=chunk_size, implementation=self.implementation)
        if self.implementation in KERNELS:
            split = on_each_device(
                lambda q, k, v, log_decay, state: operator(q, k, v, log_decay, initial_state=state),
                (HEADS, HEADS, HEADS, DECAYS, STATE),
                (HEADS, STATE),
            )
            return split(q, k, v, self.log_decay, state)
        return operator(q, k, v, self.log_decay, initial_state=state)

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return zeros: one d x d matrix per head, in 2-D one for each column too."""
        columns = (layout.cols,) if self.retention == "2d" else ()
        return jnp.zeros((batch, self.heads, *columns, self.head_dim, self.head_dim), jnp.float32)

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count as docs/method.md, section 6, does: two operations to a multiply-add.

        1-D in mode "auto" is counted as chunkwise, the cheaper of the forms that it chooses from; 2-D is counted in its
        parallel mode alone.
        """
        self.check_call(mode, None, False)
        n, c, d = layout.length, self.dim, self.head_dim
        counts: dict[str, Any] = {"parallel": 2 * n * n * c}
        if self.retention == "1d":
            chunkwise = 2 * n * c * (min(self.chunk_size or CHUNK_SIZE, n) + d)
            counts |= {"recurrent": 5 * n * c * d // 2, "chunkwise": chunkwise, "auto": chunkwise}
        if mode not in counts:
            raise ValueError(f"2-D retention is counted in mode 'parallel' alone; got {mode!r}")
        return counts[mode]
