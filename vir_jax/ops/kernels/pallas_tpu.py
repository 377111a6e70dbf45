"""Retention over a sequence on TPUs: one Pallas kernel, the state in VMEM from the first chunk to the last.

The chunkwise form (docs/method.md, section 1). q, k and v are read once and o is written once, which is all the
traffic there need be (section 6); scores, mask and state never leave the chip. Heads lie beside each other as the
projections leave them, [b, n, h d], so that nothing is transposed on the way: a step takes as many heads as fill TPU
lanes. Never run on a TPU: see the folder's docstring.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32

from vir_jax.ops.contract import contract, matmul_precision

LANES = 128
CHUNK_SIZE = 128
# A sequence up to this long is one chunk: fewer steps, and no ragged one.
ONE_CHUNK = 256


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
    with_final: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Run the kernel as a form: see `gradient` for the signature. `interpret` runs it on any machine, slowly."""
    b, n, h, d = q.shape
    e, out_dtype = v.shape[-1], v.dtype
    # TPUs multiply neither float16 nor one dtype by another.
    dtype = jnp.result_type(q, v)
    if dtype == jnp.float16:
        dtype = jnp.dtype(jnp.float32)
    q, k, v = (x.astype(dtype).reshape(b, n, -1) for x in (q, k, v))

    heads = _heads_per_step(h, d, e)
    chunk_size = n if n <= ONE_CHUNK else CHUNK_SIZE
    chunks = pl.cdiv(n, chunk_size)

    def token_block(width: int) -> pl.BlockSpec:
        def index(head: Any, row: Any, chunk: Any) -> tuple[Any, ...]:
            return row, chunks - 1 - chunk if reverse else chunk, head

        return pl.BlockSpec((None, chunk_size, heads * width), index)

    state_block = pl.BlockSpec((None, heads, d, e), lambda head, row, chunk: (row, head, 0, 0))
    # `gradient` makes the decay vary over the devices of `jax.shard_map` as all inputs do; so do the outputs.
    shape = partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(log_decay).manual_axis_type)
    kernel = partial(
        _kernel,
        n=n,
        heads=heads,
        chunks=chunks,
        reverse=reverse,
        with_arriving=arriving is not None,
        with_final=with_final,
        precision=matmul_precision(q, v),
    )
    out, *final = pl.pallas_call(
        kernel,
        grid=(h // heads, b, chunks),
        in_specs=[
            pl.BlockSpec(memory_space=pltpu.SMEM),
            *(token_block(width) for width in (d, d, e)),
            *([state_block] if arriving is not None else []),
        ],
        out_specs=[token_block(e), *([state_block] if with_final else [])],
        out_shape=[
            shape((b, n, h * e), dtype if out_dtype == jnp.float16 else out_dtype),
            *([shape((b, h, d, e), jnp.float32)] if with_final else []),
        ],
        scratch_shapes=[
            pltpu.VMEM((heads, chunk_size, chunk_size), jnp.float32),
            pltpu.VMEM((heads, d, e), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="retention",
    )(log_decay, q, k, v, *([] if arriving is None else [arriving]))
    return out.reshape(b, n, h, e).astype(out_dtype), final[0] if with_final else None


def _kernel(
    log_decay_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    n: int,
    heads: int,
    chunks: int,
    reverse: bool,
    with_arriving: bool,
    with_final: bool,
    precision: jax.lax.Precision,
) -> None:
    """Compute one chunk of some heads of one sequence.

    Steps go through the chunks in time, then sequences, then heads.
    """
    rest = list(refs)
    arriving_ref = rest.pop(0) if with_arriving else None
    out_ref = rest.pop(0)
    final_ref = rest.pop(0) if with_final else None
    mask_ref, state_ref = rest
    chunk_size = q_ref.shape[0]
    _, d, e = state_ref.shape
    chunk = pl.program_id(2)
    first_head = heads * pl.program_id(0)

    @pl.when((pl.program_id(1) == 0) & (chunk == 0))
    def make_masks() -> None:
        """Make what these heads' chunks have in common: D[i, j] = gamma^(i - j) where i is not before j."""
        i = jax.lax.broadcasted_iota(jnp.int32, (chunk_size, chunk_size), 0)
        j = jax.lax.broadcasted_iota(jnp.int32, (chunk_size, chunk_size), 1)
        elapsed = j - i if reverse else i - j
        for head in range(heads):
            power = jnp.exp(log_decay_ref[first_head + head] * jnp.maximum(elapsed, 0).astype(jnp.float32))
            mask_ref[head] = jnp.where(elapsed >= 0, power, 0.0)

    @pl.when(chunk == 0)
    def begin() -> None:
        state_ref[...] = jnp.zeros_like(state_ref) if arriving_ref is None else arriving_ref[...]

    # The last chunk in memory may reach beyond the tokens; what is read there is anything, NaN too.
    start = chunk_size * (chunks - 1 - chunk if reverse else chunk)
    size = jnp.minimum(chunk_size, n - start)

    def time(width: int) -> Float32[Array, "t width"]:
        token = jax.lax.broadcasted_iota(jnp.int32, (chunk_size, width), 0)
        return (size - 1 - token if reverse else token).astype(jnp.float32)

    def tokens(ref: Any, head: int, width: int) -> Float[Array, "t width"]:
        x = ref[:, head * width : (head + 1) * width]
        if n % chunk_size == 0:
            return x
        token = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(token < size, x, jnp.zeros_like(x))

    for head in range(heads):
        log_decay = log_decay_ref[first_head + head]
        q, k, v = tokens(q_ref, head, d), tokens(k_ref, head, d), tokens(v_ref, head, e)
        state = state_ref[head]
        scores = contract("id,jd->ij", q, k, precision) * mask_ref[head]
        out = contract("ij,je->ie", scores, v.astype(jnp.float32), precision)
        from_start = jnp.exp(log_decay * jnp.maximum(time(e), 0.0))
        out += from_start * contract("id,de->ie", q.astype(jnp.float32), state, precision)
        out_ref[:, head * e : (head + 1) * e] = out.astype(out_ref.dtype)

        to_end = jnp.exp(log_decay * jnp.maximum((size - 1).astype(jnp.float32) - time(d), 0.0))
        final = contract("jd,je->de", k * to_end, v.astype(jnp.float32), precision)
        final += jnp.exp(jnp.full((d, e), log_decay * (size - 1).astype(jnp.float32))) * state
        if final_ref is not None:

            @pl.when(chunk == chunks - 1)
            def finish(head: int = head, final: Array = final) -> None:
                final_ref[head] = final

        state_ref[head] = jnp.exp(jnp.full((d, e), log_decay)) * final


def _heads_per_step(h: int, d: int, e: int) -> int:
    """Return the fewest heads whose tokens fill whole lanes; all of them where no number does."""
    for heads in range(1, h):
        if h % heads == 0 and math.gcd(heads * d, heads * e) % LANES == 0:
            return heads
    return h
