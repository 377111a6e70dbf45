"""A decay per head and token, in every mode, against the loops."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.cases import Case, assert_close, assert_transforms_agree, in_mode, random_case
from tests.ops.test_sequence import FP32, HALF, _run
from vir_jax.ops import MODES, decay_mask, retention
from vir_jax.ops.decay import decay_between_tokens
from vir_jax.ops.reference import naive_retention, naive_retention_gradients

CHUNKS = {1: 4, 2: 1, 65: 16, 196: 64}


def token_case(b=2, n=65, h=3, d=8, e=5, *, spread=1.0, seed=0) -> Case:
    """Decays near ViR's, times a factor of their own for each token: e^(spread * a normal number)."""
    case = random_case(b, n, h, d, e, seed=seed)
    factor = np.exp(spread * np.random.default_rng(seed + 100).normal(size=(b, n, h)))
    return case._replace(log_decay=case.log_decay * jnp.asarray(factor, jnp.float32))


@pytest.mark.parametrize("n", CHUNKS)
def test_modes_agree_with_the_reference(n):
    case = token_case(n=n)
    arrays = list(map(np.asarray, case))
    expected = naive_retention(*arrays[:5]), naive_retention_gradients(*arrays)
    for mode in MODES:
        (out, final), gradients = _run(case.arguments, case.cotangents, **in_mode(mode, chunk_size=CHUNKS[n]))
        assert_close(((out, final), gradients), expected, FP32)


@pytest.mark.parametrize("mode", MODES)
def test_equal_decays_are_one_decay_per_head(mode):
    case = random_case(n=40)
    repeated = case._replace(log_decay=jnp.broadcast_to(case.log_decay, (2, 40, 3)))
    options = in_mode(mode, chunk_size=16)
    results, gradients = _run(case.arguments, case.cotangents, **options)
    ours, of_tokens = _run(repeated.arguments, repeated.cotangents, **options)
    assert_close(ours, results, FP32)
    of_tokens = (*of_tokens[:3], of_tokens[3].sum((0, 1)), of_tokens[4])
    assert_close(of_tokens, gradients, FP32)


@pytest.mark.parametrize("mode", MODES)
def test_decays_that_forget_at_once_or_never(mode):
    """Neither a long sum of large numbers nor a head that is reset now and again spoils what is small beside them."""
    case = token_case(n=300)
    rng = np.random.default_rng(1)
    decays = np.stack(
        [
            np.zeros((2, 300)),
            np.where(rng.random((2, 300)) < 0.1, -120.0, -1e-4),
            -np.exp(rng.normal(size=(2, 300))),
        ],
        -1,
    )
    case = case._replace(log_decay=jnp.asarray(decays, jnp.float32))
    results = _run(case.arguments, case.cotangents, **in_mode(mode, chunk_size=64))
    arrays = list(map(np.asarray, case))
    chex.assert_tree_all_finite(results)
    assert_close(results, (naive_retention(*arrays[:5]), naive_retention_gradients(*arrays)), FP32)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pick", [0, 1], ids=["output", "state"])
def test_gradients_of_one_result_without_a_state_before(mode, pick):
    case = token_case(n=40)

    def loss(q, k, v, log_decay):
        return jnp.sum(
            retention(q, k, v, log_decay, **in_mode(mode, chunk_size=16))[pick] * case.cotangents[pick]
        )

    gradients = jax.jit(jax.grad(loss, range(4)))(*case.arguments[:4])
    arrays = list(map(np.asarray, case))
    arrays[4] = np.zeros_like(arrays[4])
    arrays[6 - pick] = np.zeros_like(arrays[6 - pick])
    expected = naive_retention_gradients(*arrays)[:4]
    assert_close(gradients[pick:], expected[pick:], FP32)  # A state does not depend on q.


@pytest.mark.parametrize("mode", MODES)
def test_a_sequence_cut_in_pieces_is_the_whole(mode):
    case = token_case(n=50)
    op = jax.jit(partial(retention, **in_mode(mode, chunk_size=16)))
    whole = op(*case.tokens, case.log_decay, initial_state=case.initial_state)
    state, outs = case.initial_state, []
    for start, stop in ((0, 1), (1, 30), (30, 50)):
        pieces = (x[:, start:stop] for x in (*case.tokens, case.log_decay))
        out, state = op(*pieces, initial_state=state)
        outs.append(out)
    assert_close((jnp.concatenate(outs, axis=1), state), whole, FP32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision(mode, dtype):
    case = token_case(b=1, n=197, h=2, d=64, e=64)
    half = case._replace(**{name: getattr(case, name).astype(dtype) for name in ("q", "k", "v", "d_out")})
    (out, final), gradients = _run(half.arguments, half.cotangents, **in_mode(mode, chunk_size=64))
    assert (out.dtype, final.dtype) == (dtype, jnp.float32)
    chex.assert_trees_all_equal_dtypes(gradients, half.arguments)
    rounded = [np.asarray(x, np.float64) for x in half]
    expected = naive_retention(*rounded[:5]), naive_retention_gradients(*rounded)
    assert_close(((out, final), gradients), expected, HALF)


@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_decay_gradients_of_a_long_sequence(mode):
    """Differences of sums over the sequence, to which each of 16,384 terms brings its rounding."""
    case = token_case(b=1, n=16384, h=2, d=4, e=4)
    _, gradients = _run(case.arguments, case.cotangents, **in_mode(mode, chunk_size=64))
    expected = naive_retention_gradients(*map(np.asarray, case))
    assert_close(gradients[3], expected.log_decay, 5e-6)


def test_gradient_of_gradient():
    case = token_case(b=1, n=9, h=2, d=3, e=2)

    def dense(q, k, v, log_decay):
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * decay_between_tokens(log_decay)
        return q.shape[-1] ** -0.5 * jnp.einsum("bhnm,bmhe->bnhe", scores, v)

    def second_order(op):
        def penalty(*arguments):
            gradients = jax.grad(lambda *x: jnp.sum(jnp.sin(op(*x)) * case.d_out), range(4))(*arguments)
            return sum(jnp.sum(jnp.cos(g)) for g in gradients)

        return jax.jit(jax.grad(penalty, range(4)))(*case.arguments[:4])

    expected = second_order(dense)
    for mode in MODES:
        named = partial(retention, **in_mode(mode, chunk_size=4))
        assert_close(second_order(lambda *x, op=named: op(*x)[0]), expected, 1e-5)


@pytest.mark.parametrize("mode", ["parallel", "chunkwise"])
def test_vmap_jit_and_remat(mode):
    case = token_case(b=4, n=20)

    def op(q, k, v, log_decay):
        # What is mapped over is one sequence, whose decays are the first one's.
        return retention(q, k, v, log_decay[: len(q)], **in_mode(mode, chunk_size=8))

    same = case._replace(log_decay=jnp.broadcast_to(case.log_decay[:1], case.log_decay.shape))
    assert_transforms_agree(op, same, FP32)


def test_mask_is_the_product_of_the_decays_between():
    log_decay = token_case(b=1, n=20, h=2).log_decay
    gamma = np.exp(np.asarray(log_decay, np.float64))[0]
    expected = np.zeros((2, 20, 20))
    for n in range(20):
        for m in range(n + 1):
            expected[:, n, m] = np.prod(gamma[m + 1 : n + 1], axis=0)
    np.testing.assert_allclose(decay_between_tokens(log_decay)[0], expected, rtol=1e-6)
    one = jnp.full((1, 20, 1), -0.1)
    np.testing.assert_allclose(decay_between_tokens(one)[0], decay_mask(20, jnp.full(1, -0.1)), rtol=1e-6)
