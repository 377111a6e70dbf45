from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.cases import KERNELS, assert_close, assert_transforms_agree, in_mode, random_case
from vir_jax.ops import MODES, retention, sequence
from vir_jax.ops.reference import naive_retention, naive_retention_gradients
from vir_jax.ops.sequence import CHUNK_SIZES, PARALLEL_UP_TO, choose_form

FP32 = 3e-6  # relative RMS; sums of a few hundred fp32 products of either sign
HALF = 5e-3

FORMS = (*MODES, *KERNELS)

# Ragged chunks, whole chunks, one chunk too large, chunks of one token.
CHUNKS = {1: 4, 2: 1, 63: 64, 64: 16, 65: 16, 196: 64, 197: 49, 577: 50}


def _options(form, chunk_size):
    return in_mode(form, chunk_size=chunk_size)


@partial(jax.jit, static_argnames=("mode", "chunk_size", "implementation"))
def _run(arguments, cotangents, **options):
    """Output and final state, and the gradients of everything differentiable."""

    def op(q, k, v, log_decay, initial_state):
        return retention(q, k, v, log_decay, initial_state=initial_state, **options)

    results, pull_back = jax.vjp(op, *arguments)
    return results, pull_back(cotangents)


@pytest.mark.parametrize("n", CHUNKS)
def test_modes_agree_with_the_reference_and_each_other(n):
    case = random_case(n=n)
    expected = naive_retention(*map(np.asarray, case.arguments))
    gradients = naive_retention_gradients(*map(np.asarray, case))
    results = {m: _run(case.arguments, case.cotangents, **_options(m, CHUNKS[n])) for m in MODES}
    for mode in MODES:
        assert_close(results[mode], (expected, gradients), FP32)
        assert_close(results[mode], results["parallel"], FP32)


@pytest.mark.parametrize("mode", MODES)
def test_decays_at_the_ends_of_their_range(mode):
    case = random_case(n=65)._replace(log_decay=jnp.array([0.0, -1e-7, -120.0]))
    results = _run(case.arguments, case.cotangents, **_options(mode, 16))
    arrays = list(map(np.asarray, case))
    assert_close(results, (naive_retention(*arrays[:5]), naive_retention_gradients(*arrays)), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_scale_and_state_of_kernels(name, with_state, scale):
    case = random_case(2, 40, 3, 8, 5)
    state = case.initial_state if with_state else None
    op = partial(retention, implementation=name, scale=scale)
    result = jax.jit(op)(*case.tokens, case.log_decay, initial_state=state)
    arrays = map(np.asarray, (*case.tokens, case.log_decay))
    given = {"initial_state": state if state is None else np.asarray(state), "scale": scale}
    assert_close(result, naive_retention(*arrays, **given), FP32)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    b=st.integers(1, 2),
    n=st.integers(1, 40),
    h=st.integers(1, 3),
    d=st.integers(1, 8),
    e=st.integers(1, 8),
    chunk_size=st.integers(1, 50),
    mode=st.sampled_from((*MODES, "auto")),
    with_state=st.booleans(),
    scale=st.sampled_from((None, 0.3)),
)
def test_any_shape(b, n, h, d, e, chunk_size, mode, with_state, scale):
    case = random_case(b, n, h, d, e)
    state = case.initial_state if with_state else None
    op = partial(retention, **in_mode(mode, chunk_size=chunk_size), scale=scale)
    result = jax.jit(op)(*case.tokens, case.log_decay, initial_state=state)
    arrays = map(np.asarray, (*case.tokens, case.log_decay))
    expected = naive_retention(
        *arrays, initial_state=state if state is None else np.asarray(state), scale=scale
    )
    assert_close(result, expected, FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cut", [1, 30])
def test_a_sequence_cut_in_two_is_the_whole(form, cut):
    case = random_case()
    op = jax.jit(partial(retention, **_options(form, 16)))
    whole, final = op(*case.tokens, case.log_decay, initial_state=case.initial_state)
    first, state = op(*(x[:, :cut] for x in case.tokens), case.log_decay, initial_state=case.initial_state)
    second, last = op(*(x[:, cut:] for x in case.tokens), case.log_decay, initial_state=state)
    assert_close((jnp.concatenate([first, second], axis=1), last), (whole, final), FP32)


def test_steps_of_one_token_or_a_chunk_are_the_whole():
    case = random_case(n=21)
    whole, final = retention(*case.tokens, case.log_decay)
    for size in (1, 7):
        state, outs = jnp.zeros_like(case.initial_state), []
        for start in range(0, 21, size):
            tokens = (x[:, start : start + size] for x in case.tokens)
            out, state = retention(*tokens, case.log_decay, initial_state=state)
            outs.append(out)
        assert_close((jnp.concatenate(outs, axis=1), state), (whole, final), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("form", FORMS)
def test_the_future_never_changes_the_past(form):
    case, other = random_case(), random_case(seed=1)
    op = jax.jit(partial(retention, **_options(form, 16)))
    past = np.asarray(op(*case.tokens, case.log_decay)[0])
    for now in (1, 15, 16, 40, 64):
        tokens = (x.at[:, now:].set(y[:, now:]) for x, y in zip(case.tokens, other.tokens, strict=True))
        changed = np.asarray(op(*tokens, case.log_decay)[0])
        np.testing.assert_array_equal(changed[:, :now], past[:, :now])
        assert (changed[:, now:] != past[:, now:]).any(axis=(0, 2, 3)).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("form", FORMS)
def test_half_precision_of_large_activations(form, dtype):
    case = random_case(b=1, n=197, h=2, d=64, e=64)
    # fp16 ends at 65504. Scores are beyond it here; small values and cotangents bring what comes out within it.
    scales = (100, 100, 100, 1) if dtype == jnp.bfloat16 else (100, 100, 1e-2, 1e-2)
    q, k, v, d_out = (s * x for s, x in zip(scales, (*case.tokens, case.d_out), strict=True))
    case = case._replace(q=q, k=k, v=v, d_out=d_out)
    half = case._replace(**{name: getattr(case, name).astype(dtype) for name in ("q", "k", "v", "d_out")})
    (out, final), gradients = _run(half.arguments, half.cotangents, **_options(form, 64))

    assert out.dtype == dtype
    assert final.dtype == jnp.float32
    chex.assert_trees_all_equal_dtypes(gradients, half.arguments)
    chex.assert_tree_all_finite(((out, final), gradients))
    arrays = list(map(np.asarray, case))
    assert_close((out, final), naive_retention(*arrays[:5]), HALF)
    expected = naive_retention_gradients(*arrays)
    assert_close((*gradients[:3], gradients[4]), (*expected[:3], expected[4]), HALF)
    # The decay's gradient is one sum over all tokens, of either sign, in which the rounding of the inputs weighs more.
    rounded = naive_retention_gradients(*(np.asarray(x, np.float64) for x in half))
    assert_close(gradients[3], rounded.log_decay, HALF)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("form", ["chunkwise", *KERNELS])
def test_values_keep_their_dtype_among_other_dtypes(form):
    case = random_case(n=20)
    tokens = (case.q.astype(jnp.bfloat16), case.k, case.v.astype(jnp.float16))
    (out, _), gradients = _run(
        (*tokens, case.log_decay, case.initial_state),
        (case.d_out.astype(jnp.float16), case.d_final),
        **_options(form, 8),
    )
    assert out.dtype == jnp.float16
    chex.assert_trees_all_equal_dtypes(gradients[:3], tokens)
    expected, _ = naive_retention(*map(np.asarray, case.arguments))
    assert_close(out, expected, HALF)


def test_auto_is_parallel_for_few_tokens_and_chunkwise_for_many():
    longest = PARALLEL_UP_TO["cpu"]
    for n, mode in ((longest, "parallel"), (longest + 1, "chunkwise")):
        case = random_case(n=n)
        auto = retention(*case.tokens, case.log_decay)
        named = retention(*case.tokens, case.log_decay, mode=mode)
        jax.tree.map(np.testing.assert_array_equal, auto, named)


@pytest.mark.parametrize("platform", PARALLEL_UP_TO)
def test_auto_and_chunks_are_the_platforms(platform, monkeypatch):
    monkeypatch.setattr(sequence, "platform", lambda: platform)
    longest = PARALLEL_UP_TO[platform]
    assert choose_form("auto", longest) is choose_form("parallel", longest)
    for mode, n in (("auto", longest + 1), ("chunkwise", 10)):
        assert choose_form(mode, n).keywords == {"chunk_size": CHUNK_SIZES[platform]}


def test_a_chunk_size_makes_auto_chunkwise():
    case = random_case(n=20)
    auto, chunkwise, whole = (
        retention(*case.tokens, case.log_decay, **options)
        for options in ({"chunk_size": 7}, {"mode": "chunkwise", "chunk_size": 7}, {})
    )
    jax.tree.map(np.testing.assert_array_equal, auto, chunkwise)
    assert (auto[0] != whole[0]).any()


@pytest.mark.parametrize("mode", MODES)
def test_vmap_jit_and_remat(mode):
    assert_transforms_agree(partial(retention, **_options(mode, 8)), random_case(b=4, n=20), FP32)


def test_vmap_over_decays():
    case = random_case(n=20)
    decays = jnp.stack([case.log_decay, 2 * case.log_decay])
    both = jax.vmap(lambda a: retention(*case.tokens, a, mode="chunkwise", chunk_size=8))(decays)
    for *ours, log_decay in zip(*both, decays, strict=True):
        assert_close(ours, retention(*case.tokens, log_decay), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_gradient(form):
    case = random_case(b=1, n=9, h=2, d=3, e=2)

    def dense(q, k, v, log_decay, state):
        """Retention without a gradient rule of its own."""
        n, scale = q.shape[1], q.shape[-1] ** -0.5
        time = jnp.arange(n + 1)
        mask = jnp.tril(jnp.exp(log_decay[:, None, None] * (time[:, None] - time)))
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * mask[:, 1:, 1:]
        out = jnp.einsum("bhnm,bmhe->bnhe", scores, v)
        out += jnp.einsum("bnhd,hn,bhde->bnhe", q, mask[:, 1:, 0], state)
        final = jnp.einsum("bmhd,hm,bmhe->bhde", k, mask[:, -1, 1:], v) + mask[:, -1, 0, None, None] * state
        return scale * out, final

    def named(q, k, v, log_decay, state):
        return retention(q, k, v, log_decay, **_options(form, 4), initial_state=state)

    def second_order(op, *arguments):
        def loss(*arguments):
            out, final = op(*arguments)
            return jnp.sum(jnp.sin(out) * case.d_out) + jnp.sum(jnp.sin(final) * case.d_final)

        def penalty(*arguments):
            gradients = jax.grad(loss, range(5))(*arguments)
            return sum(jnp.sum(g**2) for g in gradients)

        return jax.jit(jax.grad(penalty, range(5)))(*arguments)

    with jax.enable_x64(True):
        arguments = jax.tree.map(lambda x: x.astype(jnp.float64), case.arguments)
        exact = second_order(dense, *arguments)
    assert_close(second_order(named, *case.arguments), exact, 5e-6)
