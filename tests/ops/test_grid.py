from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import NEEDS, assert_close, assert_transforms_agree, in_mode, random_case
from vir_jax.ops import MODES, decay_mask_2d, retention, retention_2d
from vir_jax.ops.grid import PARALLEL_UP_TO
from vir_jax.ops.reference import naive_retention_2d, naive_retention_2d_gradients

FP32 = 3e-6
HALF = 5e-3

KERNEL = pytest.param("cpp_cpu", marks=NEEDS["cpu"])
FORMS = (*MODES, KERNEL)

# (rows, cols), trailing tokens, rows in a chunk: not square, one row, one column, ragged and whole chunks.
GRIDS = [
    ((3, 5), 0, 1),
    ((5, 3), 1, 2),
    ((6, 4), 1, 3),
    ((1, 7), 1, 4),
    ((7, 1), 0, 2),
    ((4, 3), 3, 3),
    ((1, 1), 0, 1),
    ((11, 17), 1, 8),  # Two bands and three tiles, all but the first of each ragged.
    ((2, 70), 1, 1),  # More columns than are summed at once.
]


@partial(jax.jit, static_argnames=("grid", "mode", "chunk_rows", "implementation"))
def _run(arguments, cotangents, **options):
    """Output and final state, and the gradients of everything differentiable."""

    def op(q, k, v, log_decay, initial_state):
        return retention_2d(q, k, v, log_decay, initial_state=initial_state, **options)

    results, pull_back = jax.vjp(op, *arguments)
    return results, pull_back(cotangents)


def _tokens(grid, trailing):
    return grid[0] * grid[1] + trailing


@pytest.mark.parametrize(("grid", "trailing", "chunk_rows"), GRIDS)
def test_modes_agree_with_the_reference_and_each_other(grid, trailing, chunk_rows):
    case = random_case(n=_tokens(grid, trailing), h=2, cols=grid[1])
    arrays = list(map(np.asarray, case))
    expected = naive_retention_2d(*arrays[:4], grid, initial_state=arrays[4])
    gradients = naive_retention_2d_gradients(*arrays[:4], grid, *arrays[4:])
    results = {
        m: _run(case.arguments, case.cotangents, grid=grid, **in_mode(m, chunk_rows=chunk_rows))
        for m in MODES
    }
    for mode in MODES:
        assert_close(results[mode], (expected, gradients), FP32)
        assert_close(results[mode], results["parallel"], FP32)


@pytest.mark.parametrize("kernel", [KERNEL])
@pytest.mark.parametrize(
    ("grid", "trailing", "d", "e"), [(*each[:2], 20, 5) for each in GRIDS] + [((17, 9), 1, 64, 64)]
)
def test_a_kernel_agrees_with_the_reference(kernel, grid, trailing, d, e):
    case = random_case(n=_tokens(grid, trailing), h=2, d=d, e=e, cols=grid[1])
    arrays = list(map(np.asarray, case))
    expected = naive_retention_2d(*arrays[:4], grid, initial_state=arrays[4])
    gradients = naive_retention_2d_gradients(*arrays[:4], grid, *arrays[4:])
    assert_close(
        _run(case.arguments, case.cotangents, grid=grid, **in_mode(kernel)), (expected, gradients), FP32
    )


def test_a_kernel_of_sequences_is_refused(kernels_run):
    case = random_case(n=12)
    with pytest.raises(
        ValueError, match="'pallas_tpu' computes 1-D retention alone; use implementation='xla'"
    ):
        retention_2d(*case.tokens, case.log_decay, grid=(3, 4), implementation="pallas_tpu")


def test_a_kernel_has_tiles_of_its_own(kernels_run):
    case = random_case(n=12)
    message = (
        "'pallas_tpu' computes the chunkwise mode in chunks of its own; got mode 'auto' and chunk_rows 2"
    )
    with pytest.raises(ValueError, match=message):
        retention_2d(*case.tokens, case.log_decay, grid=(3, 4), implementation="pallas_tpu", chunk_rows=2)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 6),
    cols=st.integers(1, 6),
    trailing=st.integers(0, 3),
    h=st.integers(1, 2),
    d=st.integers(1, 5),
    e=st.integers(1, 5),
    chunk_rows=st.integers(1, 7),
    mode=st.sampled_from((*MODES, "auto")),
    with_state=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
)
def test_any_shape(rows, cols, trailing, h, d, e, chunk_rows, mode, with_state, scale):
    case = random_case(1, rows * cols + trailing, h, d, e, cols=cols)
    state = case.initial_state if with_state else None
    grid = (rows, cols)
    op = partial(retention_2d, grid=grid, **in_mode(mode, chunk_rows=chunk_rows), scale=scale)
    result = jax.jit(op)(*case.tokens, case.log_decay, initial_state=state)
    arrays = map(np.asarray, (*case.tokens, case.log_decay))
    state = state if state is None else np.asarray(state)
    expected = naive_retention_2d(*arrays, grid, initial_state=state, scale=scale)
    assert_close(result, expected, FP32)


@pytest.mark.parametrize("mode", FORMS)
def test_one_row_is_a_sequence(mode):
    case = random_case(n=9)
    out, state = retention_2d(*case.tokens, case.log_decay, grid=(1, 9), **in_mode(mode))
    assert_close((out, state[:, :, -1]), retention(*case.tokens, case.log_decay), FP32)


@pytest.mark.parametrize("mode", FORMS)
def test_an_image_cut_between_rows_is_the_whole(mode):
    rows, cols, trailing = 5, 4, 1
    case = random_case(n=_tokens((rows, cols), trailing), cols=cols)
    op = jax.jit(partial(retention_2d, **in_mode(mode, chunk_rows=2)), static_argnames="grid")
    whole, final = op(*case.tokens, case.log_decay, grid=(rows, cols), initial_state=case.initial_state)
    for cut in (3, 5):  # the second leaves the class token alone
        above, below = ([x[:, s] for x in case.tokens] for s in (slice(cut * cols), slice(cut * cols, None)))
        first, state = op(*above, case.log_decay, grid=(cut, cols), initial_state=case.initial_state)
        second, last = op(*below, case.log_decay, grid=(rows - cut, cols), initial_state=state)
        assert_close((jnp.concatenate([first, second], axis=1), last), (whole, final), FP32)


def test_an_image_that_arrives_a_few_rows_at_a_time_is_the_whole():
    cols = 4
    case = random_case(n=_tokens((5, cols), 1), cols=cols)
    whole, final = retention_2d(*case.tokens, case.log_decay, grid=(5, cols))
    state, outs, start = jnp.zeros_like(case.initial_state), [], 0
    for rows, trailing in ((1, 0), (2, 0), (2, 0), (0, 1)):
        stop = start + _tokens((rows, cols), trailing)
        tokens = (x[:, start:stop] for x in case.tokens)
        out, state = retention_2d(*tokens, case.log_decay, grid=(rows, cols), initial_state=state)
        outs.append(out)
        start = stop
    assert_close((jnp.concatenate(outs, axis=1), state), (whole, final), FP32)


@pytest.mark.parametrize("mode", FORMS)
def test_a_token_changes_only_what_is_below_and_right_of_it(mode):
    grid, trailing = (5, 4), 2
    case = random_case(n=_tokens(grid, trailing), cols=4)
    op = jax.jit(partial(retention_2d, grid=grid, **in_mode(mode, chunk_rows=2)))
    before = np.asarray(op(*case.tokens, case.log_decay)[0])
    sees = np.asarray(decay_mask_2d(grid, case.log_decay, trailing))[0] > 0
    for token in (0, 6, 11, 19, 20):
        changed = (x.at[:, token].multiply(-1.5) for x in case.tokens)
        after = np.asarray(op(*changed, case.log_decay)[0])
        differs = (after != before).any(axis=(0, 2, 3))
        np.testing.assert_array_equal(differs, sees[:, token])


@pytest.mark.parametrize("mode", FORMS)
def test_shifts_of_the_image_shift_the_output(mode):
    rows, cols, side = 6, 7, 4
    patch = [x.reshape(2, side, side, 3, -1) for x in random_case(n=side * side).tokens]
    log_decay = random_case().log_decay
    op = jax.jit(partial(retention_2d, grid=(rows, cols), **in_mode(mode, chunk_rows=2)))

    def shifted(y, x):
        tokens = (
            jnp.zeros([2, rows, cols, 3, t.shape[-1]]).at[:, y : y + side, x : x + side].set(t) for t in patch
        )
        out, _ = op(*(t.reshape(2, rows * cols, 3, -1) for t in tokens), log_decay)
        return out.reshape(2, rows, cols, 3, -1)[:, y : y + side, x : x + side]

    for y, x in ((1, 0), (0, 2), (2, 3)):
        assert_close(shifted(y, x), shifted(0, 0), FP32)


@pytest.mark.parametrize("mode", FORMS)
def test_bf16_of_large_activations(mode):
    grid = (9, 14)
    case = random_case(b=1, n=_tokens(grid, 1), h=2, d=32, e=32, cols=14)
    q, k, v = (100 * x for x in case.tokens)
    case = case._replace(q=q, k=k, v=v)
    half = case._replace(
        **{name: getattr(case, name).astype(jnp.bfloat16) for name in ("q", "k", "v", "d_out")}
    )
    results, gradients = _run(half.arguments, half.cotangents, grid=grid, **in_mode(mode, chunk_rows=4))

    assert results[0].dtype == jnp.bfloat16
    chex.assert_trees_all_equal_dtypes(gradients, half.arguments)
    chex.assert_tree_all_finite((results, gradients))
    arrays = list(map(np.asarray, case))
    assert_close(results, naive_retention_2d(*arrays[:4], grid, initial_state=arrays[4]), HALF)
    expected = naive_retention_2d_gradients(*arrays[:4], grid, *arrays[4:])
    assert_close((*gradients[:3], gradients[4]), (*expected[:3], expected[4]), HALF)


def test_auto_is_parallel_for_small_grids_and_chunkwise_for_large():
    cols = 64
    most = PARALLEL_UP_TO["cpu"] // cols
    for rows, mode in ((most, "parallel"), (most + 1, "chunkwise")):
        case = random_case(b=1, n=rows * cols, h=1, cols=cols)
        op = partial(retention_2d, *case.tokens, case.log_decay, grid=(rows, cols))
        jax.tree.map(np.testing.assert_array_equal, op(), op(mode=mode))


def test_a_state_makes_auto_chunkwise():
    case = random_case(n=40, cols=20)
    auto, chunkwise, parallel = (
        retention_2d(*case.tokens, case.log_decay, grid=(2, 20), mode=mode, initial_state=case.initial_state)
        for mode in ("auto", "chunkwise", "parallel")
    )
    jax.tree.map(np.testing.assert_array_equal, auto, chunkwise)
    assert (auto[0] != parallel[0]).any()


@pytest.mark.parametrize("rows", [1, 8, 12])
def test_a_state_that_is_given_up_is_updated_in_place(rows):
    """As a stream does with its states, which are larger than all else that it computes."""
    cols, h, d = 32, 2, 16
    tokens = [jax.ShapeDtypeStruct((1, rows * cols, h, d), jnp.float32)] * 3
    state = jax.ShapeDtypeStruct((1, h, cols, d, d), jnp.float32)

    def update(q, k, v, state):
        return retention_2d(q, k, v, random_case(h=h).log_decay, grid=(rows, cols), initial_state=state)[1]

    memory = jax.jit(update, donate_argnums=3).lower(*tokens, state).compile().memory_analysis()
    of_state = 4 * h * cols * d * d
    assert memory.alias_size_in_bytes == of_state
    assert memory.temp_size_in_bytes < 0.9 * of_state + 3 * 4 * rows * cols * h * d


def test_rows_of_a_chunk_make_auto_chunkwise():
    case = random_case(n=13)
    auto, chunkwise, whole = (
        retention_2d(*case.tokens, case.log_decay, grid=(3, 4), **options)
        for options in ({"chunk_rows": 1}, {"mode": "chunkwise", "chunk_rows": 1}, {})
    )
    jax.tree.map(np.testing.assert_array_equal, auto, chunkwise)
    assert (auto[0] != whole[0]).any()


@pytest.mark.parametrize("mode", ["chunkwise", KERNEL])
def test_vmap_jit_and_remat(mode):
    op = partial(retention_2d, grid=(3, 4), **in_mode(mode, chunk_rows=1))
    assert_transforms_agree(op, random_case(b=3, n=13), FP32)


@pytest.mark.parametrize("mode", FORMS)
def test_gradient_of_gradient(mode):
    case = random_case(b=1, n=7, h=2, d=3, e=2)

    def dense(q, k, v, log_decay):
        """Retention without a gradient rule of its own."""
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * decay_mask_2d((2, 3), log_decay, 1)
        return q.shape[-1] ** -0.5 * jnp.einsum("bhnm,bmhe->bnhe", scores, v), None

    def second_order(op):
        def loss(*arguments):
            return jnp.sum(jnp.sin(op(*arguments)[0]) * case.d_out)

        def penalty(*arguments):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.grad(loss, range(4))(*arguments))

        return jax.jit(jax.grad(penalty, range(4)))(*case.arguments[:4])

    named = partial(retention_2d, grid=(2, 3), **in_mode(mode, chunk_rows=1))
    assert_close(second_order(named), second_order(dense), 1e-5)
