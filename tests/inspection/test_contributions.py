import jax.numpy as jnp
import numpy as np
import pytest

from tests.inspection.models import GRID, OPTIONS, batch, forward, model
from tests.models.helpers import lively, relative_error
from vir_jax.inspection import layer_contributions, logit_contributions
from vir_jax.ops import retention, retention_2d, vir_log_decay


@pytest.mark.parametrize("kind", ["1d", "2d", "bidirectional", "gained", "convolved", "flips"])
def test_contributions_sum_to_the_layers_output(kind):
    contributions = layer_contributions(model(kind), batch(), (1, 3))
    assert list(contributions) == [1, 3]
    for layer, (terms, bias) in contributions.items():
        heads = forward(kind)[f"blocks.{layer}.mixer.head_outputs"]
        output = model(kind).block(layer).mixer.out(heads[:, -1:])[:, 0]
        assert relative_error(terms.sum(axis=(1, 2)) + bias, output) < 2e-6
        np.testing.assert_allclose(contributions[layer].shares().sum(axis=(1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["2d", "1d"])
def test_a_term_is_what_the_operator_gives_of_that_token_alone(kind):
    vir = model(kind)
    q, k, v = (forward(kind)[f"blocks.3.mixer.{name}"] for name in "qkv")
    terms, _ = layer_contributions(vir, batch(), (1, 3))[3]
    operator = retention if kind == "1d" else lambda *x: retention_2d(*x, grid=GRID)
    for token, head in ((0, 0), (6, 3), (12, 1)):
        alone = np.zeros((13, 4, 1))
        alone[token, head] = 1
        out, _ = operator(q, k, v * alone, vir_log_decay(4))
        expected = jnp.einsum("bhd,hdc->bc", out[:, -1], vir.block(3).mixer.out.kernel[...])
        assert relative_error(terms[:, head, token], expected) < 2e-6


@pytest.mark.parametrize("kind", OPTIONS)
def test_contributions_sum_to_the_logit(kind):
    vir, classes = model(kind), jnp.array([1, 4])
    terms = logit_contributions(vir, batch(), classes)
    logits = forward(kind)["logits"][jnp.arange(2), classes]
    # float32: each of some two hundred terms is rounded to 6e-8 of its size.
    size = sum(float(jnp.max(jnp.sum(jnp.abs(field).reshape(2, -1), axis=1))) for field in terms)
    precision = 2**-8 if kind == "bfloat16" else 1e-6
    np.testing.assert_allclose(terms.total(), logits, rtol=0, atol=precision * size)
    assert all(field.dtype == jnp.float32 for field in terms)
    of_last = terms.retention[:, -1].sum(axis=(1, 2)) + terms.retention_bias[:, -1] + terms.mlp[:, -1]
    total = terms.before_layer(vir.depth - 1) + of_last + terms.constant
    np.testing.assert_allclose(total, terms.total(), rtol=1e-5)
    np.testing.assert_array_equal(terms.before_layer(0), terms.class_token)


def test_terms_of_the_logit_are_those_of_the_residual_stream():
    """The final norm, with its statistics held, is linear: what a term adds is what its removal takes away."""
    vir, classes = model("1d"), jnp.array([0, 3])
    terms = logit_contributions(vir, batch(), classes)
    written, _ = layer_contributions(vir, batch(), (1, 3))[3]
    written = written * vir.block(3).layer_scale1.scale[...]
    read = forward("1d")["blocks.3.tokens"][:, -1]
    mean, std = read.mean(axis=-1, keepdims=True), jnp.sqrt(read.var(axis=-1, keepdims=True) + 1e-6)

    def logit(stream, mean):
        normed = (stream - mean) / std * vir.readout.norm.scale[...] + vir.readout.norm.bias[...]
        return vir.readout.head(normed)[jnp.arange(2), classes]

    np.testing.assert_allclose(logit(read, mean), forward("1d")["logits"][jnp.arange(2), classes], rtol=1e-4)
    head, token = 1, 7
    without = read - written[:, head, token]
    change = logit(read, mean) - logit(without, without.mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(change, terms.retention[:, -1, head, token], rtol=1e-3, atol=1e-5)


def test_what_has_no_such_terms_is_refused():
    with pytest.raises(ValueError, match="SoftmaxAttention; expected retention"):
        logit_contributions(lively("vit_pico2", image_size=(6, 8)), batch(), jnp.array([0, 0]))
    with pytest.raises(
        ValueError, match="by retention with decays='token'; expected retention with a decay per head"
    ):
        logit_contributions(
            lively("vir_pico2", image_size=(6, 8), decays="token"), batch(), jnp.array([0, 0])
        )
    with pytest.raises(ValueError, match="head reads 'average'"):
        layer_contributions(lively("vir_pico2", image_size=(6, 8), readout="average"), batch(), (0,))
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        layer_contributions(model("1d"), batch(), (4,))
