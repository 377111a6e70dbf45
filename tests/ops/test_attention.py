"""Attention block by block against the plain form, which stores all scores."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.cases import assert_close
from vir_jax.ops import attention
from vir_jax.ops.attention import blockwise_attention

FP32, HALF = 1e-6, 1e-2


def arrays(n, dtype=jnp.float32, *, b=2, h=3, d=8, size=1.0):
    rng = np.random.default_rng(n)
    return [jnp.asarray(size * rng.normal(size=(b, n, h, d)), dtype) for _ in range(4)]


@partial(jax.jit, static_argnums=0)
def output_and_gradients(op, q, k, v, d_out):
    out, pull_back = jax.vjp(op, q, k, v)
    return out, pull_back(d_out)


# One block, whole blocks, ragged ones, and two that leave one token over.
@pytest.mark.parametrize("n", [3, 8, 9, 13])
def test_values_and_gradients_are_those_of_the_plain_form(monkeypatch, n):
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, d_out = arrays(n)
    # A function of its own each time: what was compiled for blocks of another size is not called again.
    op = lambda q, k, v: blockwise_attention(q, k, v)  # noqa: E731
    found = output_and_gradients(op, q, k, v, d_out)
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, q, k, v, d_out), FP32)


def test_blocks_of_the_default_size():
    q, k, v, d_out = arrays(2 * attention.BLOCK + 1, b=1, h=1)
    found = output_and_gradients(blockwise_attention, q, k, v, d_out)
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, q, k, v, d_out), FP32)


def test_scores_of_any_size_do_not_overflow(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    q, k, v, d_out = arrays(10, size=100.0)
    op = lambda q, k, v: blockwise_attention(q, k, v)  # noqa: E731
    found = output_and_gradients(op, q, k, v, d_out)
    # Scores of 1e4 are rounded to 1e-3 in both forms.
    assert_close(found[0], jax.nn.dot_product_attention(q, k, v), 1e-3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_bfloat16(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    half = arrays(10, jnp.bfloat16)
    op = lambda q, k, v: blockwise_attention(q, k, v)  # noqa: E731
    found = output_and_gradients(op, *half)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
    full = [x.astype(jnp.float32) for x in half]
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, *full), HALF)


def test_which_form_is_taken():
    """On a CPU, where the tests run, scores are not stored from a length on."""
    for n, stored in ((attention.BLOCKWISE_FROM - 1, True), (attention.BLOCKWISE_FROM, False)):
        program = str(jax.make_jaxpr(attention.attention)(*arrays(n)[:3]))
        assert ("custom_vjp" in program) != stored


def test_memory_is_linear_in_the_tokens():
    def temporary(n):
        shape = jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32)
        compiled = output_and_gradients.lower(blockwise_attention, *[shape] * 4).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Scores of all would be four times as many; those of a pair of blocks are as many as before.
    assert temporary(8192) < 2.1 * temporary(4096)
    assert temporary(8192) < 8192**2


@pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="cuDNN is NVIDIA's")
@pytest.mark.parametrize("n", [196, 197])
def test_what_a_gpu_computes_is_the_plain_form(n):
    q, k, v, d_out = arrays(n, jnp.bfloat16, d=64)
    found = output_and_gradients(attention.attention, q, k, v, d_out)
    assert_close(found, output_and_gradients(jax.nn.dot_product_attention, q, k, v, d_out), HALF)
