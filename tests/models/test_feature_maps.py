"""Maps of features: tokens at their places, of any size, causal by rows, the same in every batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import abstract, images, lively, relative_error, run

SIZE = (2, 6, 8, 3)  # 3 x 4 patches


def model_of(name="vir_pico2", **options):
    return lively(name, image_size=(4, 4), **options)


@pytest.mark.parametrize(
    ("name", "options", "places"),
    [
        ("vir_pico2", {}, slice(0, 12)),
        ("vit_pico2", {}, slice(1, 13)),
        ("vit_pico2", {"mixer": "mlp_mixer", "image_size": (6, 8)}, slice(0, 12)),
        # [p1..pN, pN..p1, class token]: the second pass, backwards.
        ("vir_pico2", {"bidirectional": True}, slice(23, 11, -1)),
    ],
    ids=str,
)
def test_maps_are_the_tokens_at_their_places(name, options, places):
    model = model_of(name, **options) if "image_size" not in options else lively(name, **options)
    x = images(SIZE)
    (found,) = run(model, x, "feature_maps")
    assert (found.shape, found.dtype) == ((2, 3, 4, 64), jnp.float32)
    np.testing.assert_allclose(
        found.reshape(2, 12, 64), run(model, x, "features")[:, places], rtol=1e-5, atol=1e-5
    )
    assert (model.feature_strides, model.feature_dims) == ((2,), (64,))


@pytest.mark.parametrize("options", [{}, {"flips": True}], ids=str)
def test_maps_of_named_blocks_come_in_their_order_and_in_image_order(options):
    model, x = model_of(**options), images(SIZE)
    found = run(model, x, "feature_maps", blocks=(3, 0, 2), norm=False)
    named = run(model, x, "intermediates", names=tuple(f"blocks.{i}.tokens" for i in (3, 0, 2)))
    for block, map_ in zip((3, 0, 2), found, strict=True):
        np.testing.assert_array_equal(map_.reshape(2, 12, 64), named[f"blocks.{block}.tokens"][:, :12])


@pytest.mark.parametrize("options", [{}, {"retention": "2d"}], ids=str)
def test_rows_below_change_no_bit_above(options):
    model, x = model_of(**options), images(SIZE)
    (before,) = run(model, x, "feature_maps")
    (after,) = run(model, x.at[:, 4:].add(1.0), "feature_maps")
    np.testing.assert_array_equal(before[:, :2], after[:, :2])
    assert jnp.all(jnp.any(before[:, 2] != after[:, 2], axis=-1))


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"flips": True}], ids=str)
def test_what_reads_both_ways_has_seen_the_last_patch_everywhere(options):
    model, x = model_of(**options), images(SIZE)
    (before,) = run(model, x, "feature_maps")
    (after,) = run(model, x.at[:, -1, -1].add(1.0), "feature_maps")
    assert jnp.all(jnp.any(before != after, axis=-1))


def test_an_image_alone_has_the_maps_that_it_has_in_a_batch():
    model, x = model_of(), images(SIZE)
    (together,), (alone,) = (run(model, part, "feature_maps") for part in (x, x[1:]))
    assert relative_error(alone[0], together[1]) < 1e-6


def test_what_makes_no_sense_is_refused():
    model = abstract("vir_pico2", image_size=(4, 4))
    for blocks in ((), (4,), (-1, 0)):
        with pytest.raises(ValueError, match=r"blocks=.*; expected some of 0 to 3, or None"):
            model.feature_maps(images(SIZE), blocks)
    with pytest.raises(ValueError, match="5 x 8 pixels does not divide into patches of 2 x 2"):
        model.feature_maps(images((1, 5, 8, 3)))
    pixels = abstract("vir_pico1", stem="pixels", levels=16)
    with pytest.raises(ValueError, match="stem='pixels' has no feature maps"):
        pixels.feature_maps(jnp.zeros((1, 3, 4, 1), jnp.int32))
