import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.inspection.models import batch, forward, model
from tests.models.helpers import lively, relative_error
from vir_jax.inspection import logits_as_read
from vir_jax.models.layout import Layout


@pytest.mark.parametrize("kind", ["1d", "2d", "bidirectional", "gained"])
def test_the_last_reading_is_the_models(kind):
    read = logits_as_read(model(kind), batch())
    assert read.shape == (2, 25 if kind == "bidirectional" else 13, 5)
    assert relative_error(read[:, -1], forward(kind)["logits"]) < 2e-5


def cut(kind, read, grid):
    """Logits of the model's blocks on the first patches and the class token, token by token."""
    tokens = forward(kind)["tokens"]
    graph, params = nnx.split(model(kind))
    layout = Layout(cols=grid[1], patches=grid[0] * grid[1] if kind == "2d" else read, class_token="last")

    @jax.jit
    def classify(params, x):
        vir = nnx.merge(graph, params)
        for layer in range(vir.depth):
            x, _, _ = vir.block(layer)(x, layout, mode="recurrent")
        return vir.readout(x, layout)

    return classify(params, jnp.concatenate([tokens[:, :read], tokens[:, -1:]], axis=1))


@pytest.mark.parametrize(
    ("kind", "read", "grid"),
    [
        ("1d", 0, (0, 4)),
        ("1d", 5, (1, 4)),
        ("2d", 4, (1, 4)),
        ("2d", 8, (2, 4)),
        ("bidirectional", 17, (3, 4)),
        ("gained", 5, (1, 4)),
    ],
)
def test_every_reading_is_that_of_an_image_that_ends_there(kind, read, grid):
    assert relative_error(logits_as_read(model(kind), batch())[:, read], cut(kind, read, grid)) < 2e-5


def test_later_patches_do_not_matter():
    vir, images = model("2d"), np.asarray(batch()).copy()
    before = logits_as_read(vir, jnp.asarray(images))
    images[:, 4:] = 7  # The last of three rows.
    after = logits_as_read(vir, jnp.asarray(images))
    np.testing.assert_allclose(after[:, :9], before[:, :9], rtol=1e-5, atol=1e-6)
    assert relative_error(after[:, 9], before[:, 9]) > 1e-3


def test_a_model_without_such_a_class_token_is_refused():
    with pytest.raises(ValueError, match="expected retention"):
        logits_as_read(lively("vit_pico2", image_size=(6, 8)), batch())
    with pytest.raises(ValueError, match="flips=True: every second block reads the patches from the last"):
        logits_as_read(model("flips"), batch())
    with pytest.raises(ValueError, match="short_conv=3, which ties the class token to the patches"):
        logits_as_read(model("convolved"), batch())
