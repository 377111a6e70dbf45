"""Mixers one by one: state carried from piece to piece, and what softmax attention refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import GRID, images, lively, run
from vir_jax.models.mixers import Retention, SoftmaxAttention
from vir_jax.ops import MODES, kernels


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("retention", "pieces"),
    [
        ("1d", [(5, (3, 4)), (7, (3, 4)), (1, (3, 4))]),
        ("2d", [(8, (2, 4)), (4, (1, 4)), (1, (0, 4))]),
    ],
    ids=["1d", "2d"],
)
def test_a_block_continues_from_the_state_of_the_tokens_before(retention, pieces, mode):
    """Patches piece by piece, then the class token alone: what streaming inference rests on."""
    graph, params = nnx.split(lively(retention=retention).block(0))
    x = images((2, 13, 64))

    @jax.jit
    def whole_and_pieces(params):
        block = nnx.merge(graph, params)
        whole, end, _ = block(x, mode=mode, grid=(3, 4), return_state=True)
        outputs, state, start = [], None, 0
        for size, grid in pieces:
            tokens = x[:, start : start + size]
            out, state, _ = block(tokens, mode=mode, grid=grid, initial_state=state, return_state=True)
            outputs.append(out)
            start += size
        return (whole, end), (jnp.concatenate(outputs, axis=1), state)

    whole, continued = whole_and_pieces(params)
    for actual, expected in zip(continued, whole, strict=True):
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("implementation", kernels.PLATFORMS)
def test_kernels_give_the_same_model(implementation):
    logits = run(lively(implementation=implementation), images())
    np.testing.assert_allclose(logits, run(lively(), images()), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("kernels_run")
def test_a_kernel_gives_the_same_gradients():
    def gradients(implementation):
        graph, params = nnx.split(lively(implementation=implementation))
        return jax.jit(jax.grad(lambda params: jnp.sum(nnx.merge(graph, params)(images()) ** 2)))(params)

    jax.tree.map(
        lambda actual, expected: np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4),
        gradients("pallas_tpu"),
        gradients("xla"),
    )


def test_a_kernel_is_asked_for():
    name, platform = next(each for each in kernels.PLATFORMS.items() if each[1] != jax.default_backend())
    with pytest.raises(ValueError, match=f"'{name}' is a kernel for {platform}"):
        lively(implementation=name)(images((3, *GRID, 3)))  # not a shape that another test has compiled


def test_no_state_unless_asked_for():
    _, state, _ = lively().block(0)(images((1, 13, 64)), mode="auto", grid=(3, 4))
    assert state is None


@pytest.mark.parametrize("mode", ["recurrent", "chunkwise", "sideways"])
def test_softmax_attention_has_one_form(mode):
    with pytest.raises(ValueError, match=f"no '{mode}' mode; expected 'auto' or 'parallel'"):
        lively("vit_mu1")(images(), mode=mode)


def test_softmax_attention_has_no_state():
    mixer = SoftmaxAttention(8, 2, dtype=jnp.float32, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="no state"):
        mixer(images((1, 5, 8)), mode="auto", grid=(1, 4), return_state=True)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match="dim=10 is not divisible by heads=3"):
        Retention(10, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
