"""Logits of pixels: from which token each comes, by hand; of any size; the class token is no pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.helpers import abstract, images, lively, relative_error, run
from vir_jax.models import flops
from vir_jax.ops import MODES

SIZE = (2, 6, 8, 3)  # 3 x 4 patches


def model_of(name="vir_pico2", **options):
    return lively(name, image_size=(4, 4), **options)


def test_a_patch_s_pixels_come_from_its_token():
    model, x = model_of(readout="dense_patch"), images(SIZE)
    logits = run(model, x)
    assert (logits.shape, logits.dtype) == ((2, 6, 8, 5), jnp.float32)
    (features,) = run(model, x, "feature_maps")
    kernel, bias = model.readout.head.kernel[...], model.readout.head.bias[...]
    assert (kernel.shape, bias.shape) == ((64, 2, 2, 5), (2, 2, 5))
    for y, column in ((0, 0), (3, 6), (5, 7)):
        expected = features[:, y // 2, column // 2] @ kernel[:, y % 2, column % 2] + bias[y % 2, column % 2]
        np.testing.assert_allclose(logits[:, y, column], expected, rtol=1e-4, atol=1e-4)


def test_logits_of_patches_are_interpolated_between_their_centres():
    model, x = model_of(readout="dense_linear"), images(SIZE)
    logits = run(model, x)
    (features,) = run(model, x, "feature_maps")
    coarse = np.asarray(features @ model.readout.head.kernel[...] + model.readout.head.bias[...])

    def line(places, size):
        """Weights of the old places for each new one, centres standing at halves."""
        centre = np.clip((np.arange(size) + 0.5) * places / size - 0.5, 0, places - 1)
        return np.maximum(1 - np.abs(centre[:, None] - np.arange(places)), 0)

    expected = np.einsum("yi,xj,bijk->byxk", line(3, 6), line(4, 8), coarse)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_modes_agree():
    model, x = model_of(readout="dense_patch", chunk_size=5), images(SIZE)
    parallel, *others = (run(model, x, mode=mode) for mode in MODES)
    assert max(relative_error(other, parallel) for other in others) < 2e-5


def test_a_model_says_whether_it_is_dense_and_what_it_costs():
    dense, linear, plain = (
        abstract("vit_pico2", image_size=(4, 4), readout=readout)
        for readout in ("dense_patch", "dense_linear", "class_token")
    )
    assert (dense.dense, linear.dense, plain.dense) == (True, True, False)
    assert dense.num_classes == linear.num_classes == plain.num_classes == 5
    head = 64 * 5
    base = flops(plain, (6, 8)) - head
    assert flops(linear, (6, 8)) == base + 12 * head
    assert flops(dense, (6, 8)) == base + 12 * 4 * head


def test_a_mixer_without_a_class_token_has_pixels_too():
    model = abstract("vit_pico2", image_size=(6, 8), mixer="mlp_mixer", readout="dense_patch")
    graph, state = nnx.split(model)
    assert jax.eval_shape(lambda state: nnx.merge(graph, state)(images(SIZE)), state).shape == (2, 6, 8, 5)


def test_other_heads_are_refused_by_name():
    with pytest.raises(ValueError, match=r"readout='dense'; expected one of .*'dense_patch'"):
        abstract("vir_pico2", image_size=(4, 4), readout="dense")


@pytest.mark.parametrize("readout", ["dense_patch", "dense_linear"])
def test_logits_of_pixels_can_be_streamed(readout):
    abstract("vir_pico2", image_size=(4, 4), readout=readout).check_streamable()
