"""Retention over a sequence on NVIDIA Hopper GPUs: one kernel in Pallas Mosaic GPU, loads by TMA, products by wgmma.

The chunkwise form (docs/method.md, section 1). A block of one warpgroup takes 64 columns of one head's state through
the sequence; q, k and v are read once and o is written once, which is all the traffic there need be (section 6). Where
batch and heads do not fill the GPU, the sequence is cut into segments: a first pass finds what each adds to the state,
a second one starts every segment from the state that arrives there.

Every matrix here is of 64 x 64: a chunk is 64 tokens, and widths are cut into blocks of 64, filled up with zeros.
States and scores stay fp32. Tensor cores multiply 16-bit numbers (see `tensor_cores`): what goes into a state is
multiplied as a sum of three of them, what goes into outputs of 16 bits as one of two.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int

from vir_jax.ops.contract import contract
from vir_jax.ops.decay import decay_between
from vir_jax.ops.kernels.tensor_cores import (
    BLOCK,
    COMPILED,
    EMULATED,
    PARTS,
    Factors,
    Matrix,
    interpreter,
    split,
    sum_of,
)

FULL = 264  # blocks: two on each of a Hopper's 132 multiprocessors
MAX_WIDTH = 128  # more blocks of keys do not fit into shared memory
MIN_CHUNKS = 8  # of a segment, lest the states outweigh the tokens
STATE_PARTS = PARTS["float32"]  # of what goes into a state
OUT_PARTS = 2  # at least, of what goes into outputs: twice their digits, if they have 16 bits
SWIZZLE_BYTES = 128


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
    """Run the kernel as a form: see `gradient` for the signature. `interpret` runs it on any machine, slowly.

    Raises:
        ValueError: a key or value width above 128; in the backward pass each takes the other's place.
    """
    (b, n, h, d), e = q.shape, v.shape[-1]
    if max(d, e) > MAX_WIDTH:
        raise ValueError(
            f"'mosaic_gpu' takes key and value widths up to {MAX_WIDTH}; got {d} and {e}: use implementation='xla'"
        )
    rows, columns = (pl.cdiv(width, BLOCK) * BLOCK for width in (d, e))
    parts = PARTS[jnp.result_type(q, v).name]
    qs, ks, vs = (
        split(jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)), parts)
        for x, width in ((q, rows), (k, rows), (v, columns))
    )
    if arriving is not None:
        arriving = jnp.pad(arriving, ((0, 0), (0, 0), (0, rows - d), (0, columns - e)))

    chunks = pl.cdiv(n, BLOCK)
    wanted = FULL // (b * h * columns // BLOCK)
    per_segment = pl.cdiv(chunks, max(1, min(wanted, chunks // MIN_CHUNKS)))
    segments = pl.cdiv(chunks, per_segment)
    run = partial(
        _run,
        qs,
        ks,
        vs,
        log_decay,
        per_segment=per_segment,
        reverse=reverse,
        dtype=v.dtype,
        interpret=interpret,
    )
    if segments == 1:
        out, final = run(
            None if arriving is None else arriving[:, None], with_out=True, with_final=with_final
        )
        final = None if final is None else final[:, 0]
    else:
        _, own = run(None, with_out=False, with_final=True)
        assert own is not None
        states, final = _pass_on(own, arriving, log_decay, _last_times(n, per_segment, segments, reverse))
        out, _ = run(states, with_out=True, with_final=False)
    assert out is not None
    return out[..., :e], final[..., :d, :e] if with_final and final is not None else None


def _last_times(n: int, per_segment: int, segments: int, reverse: bool) -> Int[Array, "s"]:
    """Return the time of each segment's last token.

    Chunks lie on multiples of their size; in reverse the first is ragged.
    """
    passed = BLOCK * per_segment * jnp.arange(1, segments + 1, dtype=jnp.int32)
    whole = BLOCK * pl.cdiv(n, BLOCK)
    tokens = n - jnp.maximum(whole - passed, 0) if reverse else jnp.minimum(passed, n)
    return tokens - 1


def _pass_on(
    own: Float32[Array, "b s h d e"],
    arriving: Float32[Array, "b h d e"] | None,
    log_decay: Float32[Array, "h"],
    last: Int[Array, "s"],
) -> tuple[Float32[Array, "b s h d e"], Float32[Array, "b h d e"]]:
    """Return the state that arrives at each segment, and the final one, from what each segment adds."""
    mask = decay_between(log_decay, last, last)
    states = contract("hst,bthde->bshde", mask, own, jax.lax.Precision.HIGHEST)
    if arriving is None:
        arriving = jnp.zeros_like(own[:, 0])
    states += jnp.exp(log_decay * last[:, None])[..., None, None] * arriving[:, None]
    decayed = jnp.exp(log_decay)[:, None, None] * states[:, :-1]
    return jnp.concatenate([arriving[:, None], decayed], axis=1), states[:, -1]


def _run(
    q: Sequence[BFloat16[Array, "b n h d"]],
    k: Sequence[BFloat16[Array, "b n h d"]],
    v: Sequence[BFloat16[Array, "b n h e"]],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b s h d e"] | None,
    *,
    per_segment: int,
    reverse: bool,
    dtype: Any,
    with_out: bool,
    with_final: bool,
    interpret: bool,
) -> tuple[Float[Array, "b n h e"] | None, Float32[Array, "b s h d e"] | None]:
    """One pass: outputs, the state at the end of each segment, or both. Without outputs, q is not read."""
    (b, n, h, d), e = k[0].shape, v[0].shape[-1]
    chunks = pl.cdiv(n, BLOCK)
    segments = pl.cdiv(chunks, per_segment)
    tokens = {"q": q if with_out else (), "k": k, "v": v}
    length = n
    if interpret:  # It does not clip copies as TMA does.
        length = chunks * BLOCK
        ragged = ((0, 0), (0, length - n), (0, 0), (0, 0))
        tokens = {name: [jnp.pad(x, ragged) for x in parts] for name, parts in tokens.items()}
    results = plgpu.kernel(
        partial(
            _kernel,
            n=n,
            per_segment=per_segment,
            counts={name: len(parts) for name, parts in tokens.items()},
            reverse=reverse,
            with_arriving=arriving is not None,
            with_out=with_out,
            with_final=with_final,
            interpret=interpret,
        ),
        out_type=[
            *([jax.ShapeDtypeStruct((b, length, h, e), dtype)] if with_out else []),
            *([jax.ShapeDtypeStruct((b, segments, h, d, e), jnp.float32)] if with_final else []),
        ],
        grid=(b, segments, h, e // BLOCK),
        grid_names=("row", "segment", "head", "column"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="retention",
        **({"interpret": interpreter()} if interpret else {}),
    )(log_decay, *(x for parts in tokens.values() for x in parts), *([] if arriving is None else [arriving]))
    # Pallas forgets over which devices of `jax.shard_map` its results vary: over those that its inputs do.
    varying = tuple(jax.typeof(log_decay).manual_axis_type.varying)
    rest = [jax.lax.pcast(x, varying, to="varying") if varying else x for x in results]
    out = rest.pop(0)[:, :n] if with_out else None
    return out, rest.pop(0) if with_final else None


def _kernel(
    log_decay_ref: Any,
    *refs: Any,
    n: int,
    per_segment: int,
    counts: dict[str, int],
    reverse: bool,
    with_arriving: bool,
    with_out: bool,
    with_final: bool,
    interpret: bool,
) -> None:
    """Compute one segment of one sequence and head, 64 columns of v."""
    rest = list(refs)
    sources = {name: [rest.pop(0) for _ in range(count)] for name, count in counts.items()}
    arriving_ref: Any = rest.pop(0) if with_arriving else None
    out_ref: Any = rest.pop(0) if with_out else None
    final_ref: Any = rest.pop(0) if with_final else None
    blocks = sources["k"][0].shape[-1] // BLOCK
    parts = counts["k"]
    out_parts = max(parts, OUT_PARTS)
    stages = 2 if parts == 1 else 1
    row, segment, head, column = map(jax.lax.axis_index, ("row", "segment", "head", "column"))
    columns = pl.ds(column * BLOCK, BLOCK)
    chunks = pl.cdiv(n, BLOCK)
    first_chunk = segment * per_segment
    steps = jnp.minimum(per_segment, chunks - first_chunk)
    log_decay = log_decay_ref[head]
    products, transposed, load = EMULATED if interpret else COMPILED

    def start_of(step: Array) -> Array:
        chunk = first_chunk + step
        return BLOCK * (chunks - 1 - chunk if reverse else chunk)

    def of_block(i: int) -> Any:
        return pl.ds(i * BLOCK, BLOCK)

    def run(loaded: dict[str, Any], decayed_rest: Any, state_refs: Any, outgoing: Any, arrived: Any) -> None:
        # As TMA sees them, and as matrices.
        landing, matrices = _two_views(loaded, interpret)
        leaving, results = _two_views(outgoing, interpret)

        def fetch(step: Array) -> None:
            slot = jax.lax.rem(step, jnp.int32(stages))
            for name, by_block in landing.items():
                for i, by_part in enumerate(by_block):
                    width = columns if name == "v" else of_block(i)
                    for source, to in zip(sources[name], by_part, strict=True):
                        chunk = source.at[row, pl.ds(start_of(step), BLOCK), head, width]
                        plgpu.copy_gmem_to_smem(chunk, to.at[slot], arrived.at[slot])

        for stage in range(stages):
            pl.when(stage < steps)(partial(fetch, jnp.int32(stage)))

        i, j = (jax.lax.broadcasted_iota(jnp.int32, (BLOCK, BLOCK), axis) for axis in (0, 1))
        elapsed = (j - i if reverse else i - j).astype(jnp.float32)
        mask = jnp.where(elapsed >= 0, jnp.exp(log_decay * jnp.maximum(elapsed, 0.0)), 0.0)

        def rows_decayed(elapsed: Array) -> Matrix:
            """Return the decay of rows; those beyond the last token are zero, and of no account."""
            power = jnp.exp(log_decay * jnp.maximum(elapsed, 0.0))
            return jax.lax.broadcast_in_dim(power, (BLOCK, BLOCK), (0,))

        def chunk(step: Array, state: tuple[Matrix, ...]) -> tuple[Matrix, ...]:
            slot = jax.lax.rem(step, jnp.int32(stages))
            q, k, v = (
                [[part.at[slot] for part in by_part] for by_part in matrices[name]]
                for name in ("q", "k", "v")
            )
            start = start_of(step)
            size = jnp.minimum(BLOCK, n - start)
            token = jax.lax.broadcasted_iota(jnp.int32, (BLOCK,), 0)
            time = (size - 1 - token if reverse else token).astype(jnp.float32)
            # To the first token of the next chunk; in the last one to its last token.
            end = (size - jnp.where(step == steps - 1, 1, 0)).astype(jnp.float32)

            def decayed_keys() -> list[list[Array]]:
                left = rows_decayed(end - time)
                return [split(left * sum_of(by_part), STATE_PARTS) for by_part in k]

            if with_out:
                for state_ref, x in zip(state_refs, state, strict=True):
                    _write(state_ref, x)
                plgpu.commit_smem()
            plgpu.barrier_wait(arrived.at[slot])
            if with_out:
                keys = [[transposed(x) for x in by_part] for by_part in k]
                (scores, before), decayed = products([(q, keys), (q, state_refs)], meanwhile=decayed_keys)
            else:
                decayed = decayed_keys()
            # The scores are done with k, so that its place is free.
            places = [[*x, *more] for x, more in zip(k, decayed_rest, strict=True)]
            for place, parts in zip(places, decayed, strict=True):
                for ref, part in zip(place, parts, strict=True):
                    ref[...] = part
            plgpu.commit_smem()

            factors: list[Factors] = [([[transposed(part) for part in by_part]], v) for by_part in places]
            if with_out:
                # The scores are scaled and split while what goes into the state is multiplied.
                factors.append((lambda: [split(mask * scores, out_parts)], v))
            sums, _ = products(factors)
            if with_out:
                out = rows_decayed(time) * before + sums.pop()
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                for place, piece in zip(results, _cut(out, len(results)), strict=True):
                    place.at[jax.lax.rem(step, jnp.int32(2))][...] = piece.astype(out_ref.dtype)

            # Every thread is done with this slot, and the output is there to be copied.
            plgpu.commit_smem()
            if with_out:
                width = BLOCK // len(leaving)
                for number, place in enumerate(leaving):
                    where = pl.ds(column * BLOCK + number * width, width)
                    to = out_ref.at[row, pl.ds(start, BLOCK), head, where]
                    plgpu.copy_smem_to_gmem(place.at[jax.lax.rem(step, jnp.int32(2))], to, commit_group=False)
                plgpu.commit_smem_to_gmem_group()
            pl.when(step + stages < steps)(partial(fetch, step + stages))
            throughout = jnp.exp(log_decay * end)
            return tuple(throughout * x + more for x, more in zip(state, sums, strict=True))

        state = (jnp.zeros((BLOCK, BLOCK), jnp.float32),) * blocks
        if with_arriving:
            state = tuple(
                x + load(arriving_ref.at[row, segment, head, of_block(block), columns])
                for block, x in enumerate(state)
            )
        final = jax.lax.fori_loop(0, steps, chunk, state)
        if with_final:
            for block, x in enumerate(final):
                final_ref[row, segment, head, of_block(block), columns] = x
        plgpu.wait_smem_to_gmem(0)

    buffer = partial(_buffer, interpret=interpret)
    matrix = plgpu.SMEM((BLOCK, BLOCK), jnp.bfloat16)
    pl.run_scoped(
        run,
        {
            name: [[buffer(stages) for _ in range(count)] for _ in range(1 if name == "v" else blocks)]
            for name, count in counts.items()
        },
        [[matrix] * (STATE_PARTS - parts)] * blocks,
        [[matrix] * out_parts] * blocks if with_out else [],
        _outgoing(out_ref.dtype, buffer) if with_out else [],
        plgpu.Barrier(num_arrivals=blocks * counts["q"] + blocks * parts + parts, num_barriers=stages),
    )


def _outgoing(dtype: Any, buffer: Any) -> list[Any]:
    """Return two places for a chunk's output, in pieces of as many columns as TMA swizzles."""
    width = min(BLOCK, SWIZZLE_BYTES // jnp.dtype(dtype).itemsize)
    return [buffer(2, width=width, dtype=dtype) for _ in range(BLOCK // width)]


def _buffer(count: int, *, width: int = BLOCK, dtype: Any = jnp.bfloat16, interpret: bool) -> Any:
    """Return places for `count` matrices. They have two types: see `_two_views`."""
    shape = count, BLOCK, width
    if interpret:
        return plgpu.SMEM(shape, dtype)
    swizzle = plgpu.SwizzleTransform(SWIZZLE_BYTES)
    return plgpu.RefUnion(
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((1, width)), swizzle)),
        plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, width)), swizzle)),
    )


def _two_views(buffers: Any, interpret: bool) -> tuple[Any, Any]:
    """Return the same memory as rows for TMA, and in tiles of eight rows, as registers and tensor cores want it.

    Rows of 128 bytes lie one after another in both. But Mosaic copies whole tiles only, and n need not be a multiple
    of eight; rows are cut off where the array ends.
    """
    if interpret:
        return buffers, buffers
    leaves, tree = jax.tree.flatten(buffers, is_leaf=lambda x: not isinstance(x, list | dict))
    as_rows, as_tiles = zip(*leaves, strict=True) if leaves else ((), ())
    return jax.tree.unflatten(tree, as_rows), jax.tree.unflatten(tree, as_tiles)


def _write(refs: Sequence[Any], x: Matrix) -> None:
    for ref, part in zip(refs, split(x, len(refs)), strict=True):
        ref[...] = part


def _cut(x: Matrix, pieces: int) -> list[Array]:
    width = BLOCK // pieces
    return [x] if pieces == 1 else [x[:, i * width : (i + 1) * width] for i in range(pieces)]
