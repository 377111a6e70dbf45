"""Rotary positions: what they promise of products, and models with them, whole and in pieces."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.helpers import GRID, abstract, images, lively, parameters, relative_error, run
from vir_jax.inference import stream
from vir_jax.inspection import logits_as_read
from vir_jax.models.layout import Layout
from vir_jax.models.rope import angles_at, check_rope, rotate, token_angles
from vir_jax.ops import MODES

IMAGE = (2, 10, 14, 3)  # 5 x 7 patches; the model's own grid is 3 x 4.
ROPES = ("rope", "rope_2d")


def at(position, x):
    return rotate(x, angles_at(jnp.full(x.shape[1], position), x.shape[-1]))


@pytest.mark.parametrize("far", [0, 1000, 2_000_000])
def test_products_depend_on_the_distance_alone_however_far_down_a_stream(far):
    q, k = images((1, 5, 2, 16)), images((1, 5, 2, 16))[:, ::-1]
    near, moved = (
        np.einsum("bnhd,bnhd->bnh", at(start, q), at(start + 7, k)) for start in (np.int32(3), far + 3)
    )
    np.testing.assert_allclose(moved, near, atol=1e-5)


def test_as_defined_and_norms_stay():
    x = images((1, 3, 2, 8))
    np.testing.assert_array_equal(at(0, x), x)
    turned = np.asarray(at(5, x))
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-6)
    as_complex = np.asarray(x[..., ::2]) + 1j * np.asarray(x[..., 1::2])
    expected = as_complex * np.exp(5j * 10_000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(turned[..., ::2], expected.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], expected.imag, atol=1e-6)


@pytest.mark.parametrize(("place", "first"), [("first", -1), ("last", 0)])
def test_axial_angles_are_those_of_row_and_column(place, first):
    layout = Layout(cols=3, patches=6, class_token=place)
    y, x = np.divmod(np.arange(6), 3)
    y, x = ([-1, *y], [0, *x]) if place == "first" else ([*y, 2], [*x, 2])
    angles = np.concatenate([angles_at(jnp.array(line), 4) for line in (y, x)], axis=1)
    np.testing.assert_array_equal(token_angles(layout, "2d", 8), angles)
    np.testing.assert_array_equal(token_angles(layout, "1d", 8), angles_at(jnp.arange(7), 8))


def test_a_second_pass_stands_where_the_first_did():
    layout = Layout(cols=3, patches=6, class_token="last", passes=2)
    angles = token_angles(layout, "2d", 8)
    np.testing.assert_array_equal(angles[6:12], angles[:6][::-1])
    assert token_angles(layout, "1d", 8).shape == (13, 4)


@pytest.mark.parametrize("name", ["vir_pico1", "vit_pico1"])
@pytest.mark.parametrize("position", ROPES)
def test_nothing_is_learned_or_added(name, position):
    missing = parameters(abstract(name)).keys() - parameters(abstract(name, position=position)).keys()
    assert missing == {"stem.position.embedding"} | (
        {"stem.class_position_embedding"} if name == "vit_pico1" else set()
    )
    found = run(lively(name, position=position), images(), "intermediates", names=("patch_tokens", "tokens"))
    patches = slice(1, None) if name == "vit_pico1" else slice(-1)
    np.testing.assert_array_equal(found["tokens"][:, patches], found["patch_tokens"])


@pytest.mark.parametrize("position", ["none", *ROPES])
def test_attention_without_positions_is_blind_to_order_and_with_them_is_not(position):
    x = images()
    moved = x[:, ::-1, ::-1]
    model = lively("vit_pico1", position=position)
    before, after = (run(model, y, "features")[:, 1:] for y in (x, moved))
    difference = relative_error(after[:, ::-1], before)
    assert (difference < 1e-5) == (position == "none")


@pytest.mark.parametrize(("position", "retention"), [("rope", "1d"), ("rope_2d", "2d")])
def test_modes_agree_and_a_stream_is_the_whole_image(position, retention):
    """The pieces begin in rows of all kinds; patches are read in chunks that do not divide a row."""
    model = lively("vir_pico2", image_size=(6, 8), position=position, retention=retention)
    x = images(IMAGE)
    expected = run(model, x, mode="parallel")
    for mode in MODES[1:]:
        assert relative_error(run(model, x, mode=mode), expected) < 2e-5
    assert relative_error(stream(model, x, chunk_size=9), expected) < 2e-5


@pytest.mark.parametrize(
    ("position", "options"),
    [("rope", {}), ("rope_2d", {"bidirectional": True}), ("rope_2d", {"retention": "2d"})],
)
def test_what_is_read_as_patches_arrive_ends_with_the_logits(position, options):
    model = lively("vir_pico1", position=position, **options)
    assert relative_error(logits_as_read(model, images())[:, -1], run(model, images())) < 2e-5


@pytest.mark.parametrize("position", ROPES)
def test_who_has_no_queries_refuses(position):
    with pytest.raises(ValueError, match=r"'fnet' has no queries and keys.*retention.*softmax"):
        abstract("vit_pico1", mixer="fnet", position=position, image_size=GRID)


def test_heads_must_have_pairs():
    with pytest.raises(ValueError, match=r"position='rope_2d' turns pairs of channels.*multiple of 4.*got 6"):
        check_rope("2d", 6)
