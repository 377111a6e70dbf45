"""The twin of pixels: of an image that is read whole no scores are stored, and none computed in hidden blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vir_jax.models.layout import Layout
from vir_jax.models.mixers.causal_softmax import CausalSoftmaxAttention
from vir_jax.ops.attention import BLOCK, BLOCKWISE_FROM

DIM, HEADS = 8, 2
LENGTHS = (1, BLOCKWISE_FROM - 1, BLOCKWISE_FROM, 2 * BLOCK + 1)


def heads_of(length):
    shape = 3, 2, length, HEADS, DIM // HEADS
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def mixer():
    return CausalSoftmaxAttention(DIM, HEADS, layout_of(1), dtype="float32", rngs=nnx.Rngs(0))


def layout_of(length):
    return Layout(cols=length, patches=length, class_token=None)


@pytest.mark.parametrize("length", LENGTHS)
def test_blocks_are_the_whole(length):
    """In value and gradient."""
    made, weights = mixer(), np.random.default_rng(1).normal(size=(2, length, HEADS, DIM // HEADS))

    def of_blocks(heads):
        outputs, _ = made.mix(*heads, layout_of(length), mode="auto", state=None)
        return jnp.sum(weights * outputs), outputs

    def of_one(heads):
        outputs = jax.nn.dot_product_attention(*heads, is_causal=True)
        return jnp.sum(weights * outputs), outputs

    found, wanted = (
        jax.jit(jax.grad(function, has_aux=True))(heads_of(length)) for function in (of_blocks, of_one)
    )
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6)


def test_what_comes_later_changes_nothing():
    """To the last bit, on both sides of a block's end."""
    length = 2 * BLOCK  # Two blocks.
    made, heads = mixer(), heads_of(length)
    for changed in (1, BLOCK, length - 1):
        before, after = (
            np.asarray(made.mix(*x, layout_of(length), mode="auto", state=None)[0])
            for x in (heads, heads.at[:, :, changed].add(1.0))
        )
        np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
        assert (before[:, changed] != after[:, changed]).any()


def test_what_is_hidden_is_not_counted():
    """Of n tokens in many blocks about half of n^2 scores are computed."""
    made, length = mixer(), 16 * BLOCK
    whole = 2 * length**2 * DIM
    assert made.mixing_multiply_adds(layout_of(length), "auto") == whole * 17 // 32
    assert made.mixing_multiply_adds(layout_of(BLOCK), "auto") == 2 * BLOCK**2 * DIM
