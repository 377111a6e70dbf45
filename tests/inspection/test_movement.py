import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.inspection.movement import kind_of, movement, norms_by_block


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("blocks.layer_scale1.scale", "LayerScale"),
        ("stages.1.blocks.norm1.scale", "norm"),
        ("final_norm.scale", "norm"),
        ("final_norm.bias", "bias"),
        ("stem.conv1.norm.var", "statistics"),
        ("head.bias", "bias"),
        ("head.kernel", "head"),
        ("blocks.mixer.qkv.kernel", "kernel"),
        ("patch_embedding.kernel", "kernel"),
        ("class_token", "class token"),
        ("class_position_embedding", "position embedding"),
        ("something", "other"),
    ],
)
def test_kinds(path, kind):
    assert kind_of(path) == kind


def test_movement_by_hand():
    before = {
        "a": {"kernel": jnp.array([3.0, 4.0])},
        "head": {"bias": jnp.zeros(2)},
        "b": {"kernel": jnp.zeros(2)},
    }
    after = {
        "a": {"kernel": jnp.array([3.0, 5.0])},
        "head": {"bias": jnp.ones(2)},
        "b": {"kernel": jnp.zeros(2)},
    }
    moved = movement(before, after)
    assert moved.keys() == {"kernel", "bias"}
    np.testing.assert_allclose(moved["kernel"], (2.5, 0.5))  # sqrt((9 + 16 + 0 + 0) / 4), sqrt(1 / 4)
    np.testing.assert_allclose(moved["bias"], (0.0, 1.0))
    assert movement(before, after, str).keys() == {"a.kernel", "b.kernel", "head.bias"}


def test_norms_by_block():
    gradients = {
        "blocks": {"kernel": jnp.array([[3.0, 0.0], [0.0, 6.0]]), "bias": jnp.array([4.0, 8.0])},
        "head": {"kernel": jnp.array([[1.0], [2.0]])},
        "stem": jnp.array(2.0),
    }
    norms = norms_by_block(gradients)
    np.testing.assert_allclose(norms["blocks"], [5.0, 10.0])
    np.testing.assert_allclose(norms["others"], 3.0)
