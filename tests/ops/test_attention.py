"""Attention block by block against the plain form, which stores all scores; each of all tokens, and causal."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.cases import assert_close
from vir_jax.ops import attention
from vir_jax.ops.attention import blockwise_attention, scores_computed

FP32, HALF = 1e-6, 1e-2
both = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@pytest.fixture(autouse=True)
def exact_products():
    """A GPU multiplies float32 with ten bits otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def arrays(n, dtype=jnp.float32, *, b=2, h=3, d=8, size=1.0):
    rng = np.random.default_rng(n)
    return [jnp.asarray(size * rng.normal(size=(b, n, h, d)), dtype) for _ in range(4)]


@partial(jax.jit, static_argnums=0)
def output_and_gradients(op, q, k, v, d_out):
    out, pull_back = jax.vjp(op, q, k, v)
    return out, pull_back(d_out)


def blockwise(causal):
    """A function of its own each time: what was compiled for blocks of another size is not called again."""
    return lambda q, k, v: blockwise_attention(q, k, v, causal)


def plain(causal):
    return partial(jax.nn.dot_product_attention, is_causal=causal)


# One block, whole blocks, ragged ones, and two that leave one token over.
@both
@pytest.mark.parametrize("n", [3, 8, 9, 13])
def test_values_and_gradients_are_those_of_the_plain_form(monkeypatch, n, causal):
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, d_out = arrays(n)
    found = output_and_gradients(blockwise(causal), q, k, v, d_out)
    assert_close(found, output_and_gradients(plain(causal), q, k, v, d_out), FP32)


@both
def test_blocks_of_the_default_size(causal):
    q, k, v, d_out = arrays(2 * attention.BLOCK + 1, b=1, h=1)
    found = output_and_gradients(blockwise(causal), q, k, v, d_out)
    assert_close(found, output_and_gradients(plain(causal), q, k, v, d_out), FP32)


@both
def test_scores_of_any_size_do_not_overflow(monkeypatch, causal):
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, d_out = arrays(10, size=100.0)
    found = output_and_gradients(blockwise(causal), q, k, v, d_out)
    # Scores of 1e4 are rounded to 1e-3 in both forms.
    assert_close(found[0], plain(causal)(q, k, v), 1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


@both
def test_bfloat16(monkeypatch, causal):
    monkeypatch.setattr(attention, "BLOCK", 4)
    half = arrays(10, jnp.bfloat16)
    found = output_and_gradients(blockwise(causal), *half)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    full = [x.astype(jnp.float32) for x in half]
    assert_close(found, output_and_gradients(plain(causal), *full), HALF)


def test_what_is_hidden_is_not_computed(monkeypatch):
    """Blocks of keys that are later than all of a block's queries: what is not finite in them reaches nothing."""
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, d_out = arrays(12)
    last = slice(8, None)
    poisoned = [x.at[:, last].set(jnp.nan) for x in (q, k, v)]
    out, pull_back = jax.vjp(blockwise(True), *poisoned)
    gradients = pull_back(d_out.at[:, last].set(0.0))
    wanted = output_and_gradients(blockwise(True), *(x[:, :8] for x in (q, k, v, d_out)))
    assert_close(out[:, :8], wanted[0], FP32)
    assert_close(gradients[0][:, :8], wanted[1][0], FP32)
    # A mask would give exact zeros times what is not finite.
    assert np.isnan(plain(True)(*poisoned)[:, :8]).any()


@pytest.mark.parametrize(
    ("n", "causal", "scores"),
    [(1000, False, 1000**2), (100, True, 100**2), (128, True, 128**2), (1000, True, 10 * 250**2)],
)
def test_scores_are_counted_as_they_are_computed(n, causal, scores):
    """Four blocks of 250 tokens make ten pairs."""
    assert scores_computed(n, causal=causal) == scores


@pytest.mark.skipif("jax.default_backend() != 'cpu'", reason="elsewhere it is the platform's own")
@both
def test_which_form_is_taken_on_a_cpu(causal):
    """Scores are not stored from a length on."""
    for n, stored in ((attention.BLOCKWISE_FROM - 1, True), (attention.BLOCKWISE_FROM, False)):
        program = str(jax.make_jaxpr(partial(attention.attention, causal=causal))(*arrays(n)[:3]))
        assert ("custom_vjp" in program) != stored


@both
def test_memory_is_linear_in_the_tokens(causal):
    def temporary(n):
        shape = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
        compiled = output_and_gradients.lower(blockwise(causal), *[shape] * 4).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Scores of all would be four times as many; those of a pair of blocks are as many as before.
    assert temporary(8192) < 2.1 * temporary(4096)
    assert temporary(8192) < 8192**2


@pytest.mark.parametrize("n", [8, 9])
def test_a_token_more_for_cudnn_changes_nothing(monkeypatch, n):
    """By XLA's form of the same function, which takes the same arguments."""
    asked = []

    def by_xla(*tokens, implementation, **options):
        asked.append(implementation)
        assert tokens[0].shape[1] % 2 == 0
        return plain_attention(*tokens, implementation="xla", **options)

    plain_attention = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    q, k, v, d_out = arrays(n)
    found = output_and_gradients(lambda *x: attention._cudnn_attention(*x), q, k, v, d_out)
    monkeypatch.undo()
    assert asked == ["cudnn"]
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, q, k, v, d_out), FP32)


@pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="cuDNN is NVIDIA's")
@pytest.mark.parametrize("n", [196, 197])
def test_what_a_gpu_computes_is_the_plain_form(n):
    q, k, v, d_out = arrays(n, jnp.bfloat16, d=64)
    found = output_and_gradients(attention.attention, q, k, v, d_out)
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, q, k, v, d_out), HALF)
