"""Retention, ViR's mixer, along the raster order or by rows and columns."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from vir_jax.models.layers import linear_init
from vir_jax.models.layout import Layout
from vir_jax.models.linear import Linear
from vir_jax.models.mixers.decays import DECAYS, make_decay
from vir_jax.models.mixers.heads import Heads, HeadsMixer
from vir_jax.models.mixers.mixer import State, register
from vir_jax.models.mixers.short_convolution import ShortConvolution
from vir_jax.models.sharding import constrain, on_each_device
from vir_jax.ops import MODES, retention, retention_2d
from vir_jax.ops.decay import Decays
from vir_jax.ops.grid import tile_side
from vir_jax.ops.kernels import GRID_KERNELS
from vir_jax.ops.kernels import PLATFORMS as KERNELS
from vir_jax.ops.sequence import CHUNK_SIZE

# Dimensions of heads' tokens, of decays and of a state in 1-D and in 2-D; see `on_each_device`.
HEADS, PER_HEAD, STATE = ("batch", None, "heads", None), ("heads",), ("batch", "heads", None, None)
STATE_2D = (*STATE, None)

QK_NORMS = ("rms", "layer")
NORM_EPSILON = 1e-6


@register("retention")
class Retention(HeadsMixer):
    """Retention, by default with ViR's fixed decays and nothing else (docs/method.md, sections 1, 2 and 9).

    Where heads read in several directions, their q, k and v are turned, and the output back; the class token stays the
    last to read (docs/method.md, section 9). From both ends, or in 2-D from all corners, a patch sees the whole image.

    The state is `[b, h, d, d]` in 1-D, `[b, h, cols, d, d]` in 2-D, float32; with a short convolution a pair of it and
    the last tokens `[b, w, c]`. Where heads are normalised or gated there is one more intermediate, "gain", by which
    each head's sum over tokens is multiplied.

    Args:
        dim: channels.
        heads: of dim / heads channels each.
        layout: of the image size that the model is made for.
        retention: "1d" decays along the sequence, "2d" by rows and columns. None: "1d".
        chunk_size: tokens in a chunk, 1-D alone, in the mode "chunkwise", and in "auto", which is then chunkwise. None:
            the operator's choice.
        implementation: "xla", or a kernel of `vir_jax.ops.kernels` for the chunkwise mode, in 2-D "cpp_cpu". None: the
            operator's choice. A kernel that is named runs on each device of the mesh in context (`jax.set_mesh`),
            batch and heads split as everywhere; a mesh that does not divide them, or has other axes, is an error
            then.
        decays: "vir", "retnet", "none" (nothing is forgotten); "learned", one per head, ViR's at first; or "token", 1-D
            alone: computed of each token for each head, near ViR's at first. With the last each layer has
            `decay.logit.kernel [c, h]` and `bias [h]`, with "learned" `decay.logit [h]`.
        qk_norm: "rms" or "layer": q and k of every head are normalised, with a learned scale `q_norm.scale [d]` and
            `k_norm.scale [d]` for all heads. None: they are not.
        head_norm: whether each head's output is divided by its root mean square, without parameters.
        gate: whether each head's output is multiplied by swish(gate(x)), `gate.kernel [c, h, d]` and `bias [h, d]`.
        directions: in which heads read the patches, by turns: 1, from the first to the last; 2, backwards, too; or 4,
            in 2-D, from each corner. With more than one the mixer is not causal: there is no state.
        short_conv: width of a causal convolution over tokens before all projections, `short_conv.kernel [width, c]`
            (see `ShortConvolution`). None: there is none.
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
        decays: str = "vir",
        qk_norm: str | None = None,
        head_norm: bool = False,
        gate: bool = False,
        short_conv: int | None = None,
        directions: int = 1,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        _check_values(
            retention=retention,
            chunk_size=chunk_size,
            implementation=implementation,
            decays=decays,
            qk_norm=qk_norm,
            head_norm=head_norm,
            gate=gate,
            short_conv=short_conv,
            directions=directions,
        )
        _check_together(
            retention=retention,
            chunk_size=chunk_size,
            implementation=implementation,
            decays=decays,
            directions=directions,
            heads=heads,
            layout=layout,
        )
        super().__init__(dim, heads, layout, dtype=dtype, rngs=rngs)
        self.in_2d, self.per_token = retention == "2d", decays == "token"
        self.reads_rows = tile_side() if self.in_2d else 0
        self.directions, self.causal = directions, directions == 1
        known = self.causal and not self.per_token
        self.retention = None if not known else "2d" if self.in_2d else "1d"
        self.chunk_size, self.implementation = chunk_size, implementation
        self.modes = ("chunkwise",) if implementation in KERNELS else MODES
        self.decay = make_decay(decays, dim, heads, rngs=rngs)
        self.q_norm, self.k_norm = (
            None if qk_norm is None else _norm(qk_norm, self.head_dim, dtype=dtype, rngs=rngs) for _ in "qk"
        )
        self.head_norm = head_norm
        self.gate = _gate(dim, heads, dtype=dtype, rngs=rngs) if gate else None
        self.short_conv = None if short_conv is None else ShortConvolution(short_conv, dim, rngs=rngs)
        if head_norm or gate:
            self.intermediate_names = (*self.intermediate_names, "gain")

    @property
    def log_decay(self) -> Float32[Array, "*l h"]:
        """log(gamma) of each head; where layers are stacked and each has its own, of each layer.

        Raises:
            ValueError: the decays are those of tokens.
        """
        return self.decay.of_heads()

    @property
    def described(self) -> str:
        """What it is, for messages."""
        if not self.causal:
            return f"retention with directions={self.directions}"
        return "retention with decays='token'" if self.per_token else type(self).__name__

    def __call__(
        self,
        x: Float[Array, "b n c"],
        layout: Layout,
        *,
        mode: str = "auto",
        state: State | None = None,
        return_state: bool = False,
    ) -> tuple[Float[Array, "b n c"], State | None, dict[str, Heads]]:
        """Project, mix and project back, after the short convolution if there is one; see `Mixer.__call__`."""
        read = partial(super().__call__, layout=layout, mode=mode, return_state=return_state)
        if self.short_conv is None:
            return read(x, state=state)
        sums, recent = (None, None) if state is None else state
        x, recent = self.short_conv(x, recent)
        mixed, sums, found = read(x, state=sums)
        assert not isinstance(sums, tuple)
        return mixed, None if sums is None else (sums, recent), found

    def project(self, x: Float[Array, "b n c"]) -> list[Heads]:
        """Return q and k, normalised where they are to be, and v."""
        q, k, v = super().project(x)
        return [q if self.q_norm is None else self.q_norm(q), k if self.k_norm is None else self.k_norm(k), v]

    def mix_of(
        self,
        x: Float[Array, "b n c"],
        q: Heads,
        k: Heads,
        v: Heads,
        layout: Layout,
        *,
        mode: str,
        state: State | None,
    ) -> tuple[Heads, State | None]:
        """Compute retention with the decays of x, each head in its direction."""
        log_decay = self.decay(x)
        turn = partial(self._turned, layout=layout)
        if self.per_token:
            log_decay = turn(log_decay)
        mixed, state = self.mix(
            turn(q), turn(k), turn(v), layout, mode=mode, state=state, log_decay=log_decay
        )
        return turn(mixed), state

    def _turned(self, x: Float[Array, "b n h *d"], layout: Layout) -> Float[Array, "b n h *d"]:
        """Return the patches of every head in the order in which it reads them; turned again they are as they were.

        Every second head reads backwards, from the last corner; of four directions the third and the fourth have the
        rows upside down besides, and begin at the two other corners.
        """
        head = jnp.arange(self.heads).reshape(-1, *(1,) * (x.ndim - 3))
        if self.directions > 1:
            x = jnp.where(head % 2 == 1, layout.backwards(x), x)
        if self.directions > 2:
            x = jnp.where(head % 4 >= 2, layout.upside_down(x), x)
        return x

    def gain(self, x: Float[Array, "b n c"], outputs: Heads) -> Float32[Array, "b n h #d"] | None:
        """Compute 1 / RMS over a head's channels, where it is normalised, times swish(gate(x)), where it is gated."""
        gain = None
        if self.head_norm:
            square = jnp.square(outputs.astype(jnp.float32))
            gain = jax.lax.rsqrt(jnp.mean(square, axis=-1, keepdims=True) + NORM_EPSILON)
        if self.gate is not None:
            gate = checkpoint_name(constrain(self.gate(x), "batch", None, "heads", None), "gate")
            gate = jax.nn.silu(gate.astype(jnp.float32))
            gain = gate if gain is None else gain * gate
        return gain

    def mix(
        self,
        q: Heads,
        k: Heads,
        v: Heads,
        layout: Layout,
        *,
        mode: str,
        state: State | None,
        log_decay: Decays | None = None,
    ) -> tuple[Heads, State | None]:
        """O = (Q K^T .* D) V, or one of its equal forms; the decays are those of heads where none are given."""
        log_decay = self.log_decay if log_decay is None else log_decay
        assert not isinstance(state, tuple)
        operator: Callable[..., tuple[Heads, State]]
        if self.in_2d:
            operator = partial(retention_2d, grid=layout.grid, mode=mode, implementation=self.implementation)
        else:
            chunk_size = self.chunk_size if mode in ("auto", "chunkwise") else None
            operator = partial(
                retention, mode=mode, chunk_size=chunk_size, implementation=self.implementation
            )
        if self.implementation in KERNELS:
            sums = STATE_2D if self.in_2d else STATE
            split = on_each_device(
                lambda q, k, v, log_decay, state: operator(q, k, v, log_decay, initial_state=state),
                (HEADS, HEADS, HEADS, PER_HEAD, sums),
                (HEADS, sums),
            )
            return split(q, k, v, log_decay, state)
        return operator(q, k, v, log_decay, initial_state=state)

    def initial_state(self, batch: int, layout: Layout) -> State:
        """Return zeros: one d x d matrix per head, in 2-D one for each column too; and of a convolution its tokens.

        Raises:
            ValueError: heads read in several directions.
        """
        if not self.causal:
            raise ValueError(
                f"{self.described} has no state: half of the heads read the patches backwards, from the last. Use "
                "directions=1, or give it the whole image."
            )
        columns = (layout.cols,) if self.in_2d else ()
        sums = jnp.zeros((batch, self.heads, *columns, self.head_dim, self.head_dim), jnp.float32)
        return sums if self.short_conv is None else (sums, self.short_conv.initial_state(batch))

    def multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count what every mixer with heads has, and the options that multiply: gate, decays per token, convolution."""
        n, c = layout.length, self.dim
        options = n * c * c if self.gate is not None else 0
        options += n * c * self.heads if self.per_token else 0
        options += 0 if self.short_conv is None else self.short_conv.multiply_adds(n)
        return super().multiply_adds(layout, mode) + options

    def mixing_multiply_adds(self, layout: Layout, mode: str) -> int:
        """Count as docs/method.md, section 6, does: two operations to a multiply-add.

        1-D in mode "auto" is counted as chunkwise, the cheaper of the forms that it chooses from; 2-D is counted in its
        parallel mode alone.
        """
        self.check_call(mode, None, False)
        n, c, d = layout.length, self.dim, self.head_dim
        counts: dict[str, Any] = {"parallel": 2 * n * n * c}
        if not self.in_2d:
            chunkwise = 2 * n * c * (min(self.chunk_size or CHUNK_SIZE, n) + d)
            counts |= {"recurrent": 5 * n * c * d // 2, "chunkwise": chunkwise, "auto": chunkwise}
        if mode not in counts:
            raise ValueError(f"2-D retention is counted in mode 'parallel' alone; got {mode!r}")
        return counts[mode]


def _norm(name: str, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    if name == "rms":
        return nnx.RMSNorm(dim, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
    return nnx.LayerNorm(dim, epsilon=NORM_EPSILON, use_bias=False, dtype=dtype, rngs=rngs)


def _gate(dim: int, heads: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Linear:
    return Linear(
        dim,
        (heads, dim // heads),
        dtype=dtype,
        kernel_init=linear_init,
        kernel_metadata={"axes": ("embed", "heads", None)},
        bias_metadata={"axes": ("heads", None)},
        rngs=rngs,
    )


def _check_values(**options: Any) -> None:
    """Check each option by itself."""
    choices = {
        "retention": (None, "1d", "2d"),
        "implementation": (None, "xla", *KERNELS),
        "decays": DECAYS,
        "qk_norm": (None, *QK_NORMS),
        "head_norm": (True, False),
        "gate": (True, False),
        "directions": (1, 2, 4),
    }
    for option, known in choices.items():
        value = options[option]
        # 1 and 1.0 equal True.
        if not any(type(value) is type(each) and value == each for each in known):
            raise ValueError(f"{option}={value!r}; expected one of {known}.")
    for option, least, what in (
        ("chunk_size", 1, "a positive number of tokens"),
        ("short_conv", 2, "a width of 2 or more tokens"),
    ):
        value = options[option]
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"{option}={value!r}; expected {what}, or None.")


def _check_together(
    *,
    retention: str | None,
    chunk_size: int | None,
    implementation: str | None,
    decays: str,
    directions: int,
    heads: int,
    layout: Layout,
) -> None:
    """Check that the options make sense together."""
    kernel, in_2d, per_token = implementation in KERNELS, retention == "2d", decays == "token"
    nonsense = (
        (
            in_2d and layout.passes == 2,
            "bidirectional=True makes no sense with retention='2d': the flipped patches continue a sequence, and the "
            "2-D mask is defined on one grid of patches. Choose one of the two.",
        ),
        (
            in_2d and chunk_size is not None,
            f"chunk_size={chunk_size} makes no sense with retention='2d': its chunks are whole rows of the grid. Leave "
            "it out.",
        ),
        (
            in_2d and kernel and implementation not in GRID_KERNELS,
            f"implementation={implementation!r} makes no sense with retention='2d': it is a kernel for 1-D "
            "retention alone. Leave it out.",
        ),
        (
            kernel and chunk_size is not None,
            f"chunk_size={chunk_size} makes no sense with implementation={implementation!r}, which computes in chunks "
            "of its own. Leave it out.",
        ),
        (
            in_2d and per_token,
            "decays='token' makes no sense with retention='2d', whose mask is a product of rows and columns with one "
            "decay per head. Choose one of the two.",
        ),
        (
            kernel and per_token,
            f"decays='token' makes no sense with implementation={implementation!r}: kernels take one decay per head. "
            "Choose other decays, or implementation='xla'.",
        ),
        (
            directions == 4 and not in_2d,
            "directions=4 makes no sense with retention='1d': a sequence is read from one of its two ends. Use "
            "directions=2, or retention='2d'.",
        ),
        (
            directions > heads,
            f"directions={directions} makes no sense with {heads} heads, which read in one direction each. Use fewer "
            "directions, or more heads.",
        ),
    )
    for applies, message in nonsense:
        if applies:
            raise ValueError(message)
