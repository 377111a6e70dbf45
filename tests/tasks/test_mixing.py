import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.models.pixels import normalize
from vir_jax.tasks.mixing import cutmix, mix, mixup, random_boxes, smooth_labels


def test_normalize():
    images = jnp.full((1, 1, 1, 3), 51, jnp.uint8)  # 51 / 255 = 0.2
    chex.assert_trees_all_close(
        normalize(images, (0.2, 0.1, 0.0), (1.0, 0.5, 0.1))[0, 0, 0], jnp.array([0.0, 0.2, 2.0]), atol=1e-6
    )


def test_smooth_labels():
    chex.assert_trees_all_close(
        smooth_labels(jnp.array([2, 0]), 4, 0.1),
        jnp.array([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]),
    )


def test_mixup_by_hand():
    images = jnp.arange(4.0).reshape(4, 1, 1, 1) * jnp.ones((4, 2, 2, 1))
    targets = jnp.eye(4)
    mixed, soft = mixup(images, targets, jnp.array([0.75, 0.75, 1.0, 1.0]))
    chex.assert_trees_all_close(mixed[:, 0, 0, 0], jnp.array([0.25, 0.75, 2.0, 3.0]))
    chex.assert_trees_all_close(
        soft, jnp.array([[0.75, 0.25, 0, 0], [0.25, 0.75, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    )


def test_cutmix_by_hand():
    images = jnp.stack([jnp.zeros((2, 2, 1)), jnp.ones((2, 2, 1))])
    box = jnp.zeros((2, 2, 2), bool).at[:, 0, 1].set(True)
    mixed, soft = cutmix(images, jnp.eye(2), box)
    chex.assert_trees_all_close(mixed[..., 0], jnp.array([[[0, 1], [0, 0]], [[1, 0], [1, 1.0]]]))
    chex.assert_trees_all_close(soft, jnp.array([[0.75, 0.25], [0.25, 0.75]]))


def test_boxes_are_rectangles_of_the_area_asked_for():
    area = jnp.linspace(0, 1, 500)
    boxes = np.asarray(random_boxes(jax.random.key(0), area, 32, 48))
    rows, cols = boxes.any(2), boxes.any(1)
    np.testing.assert_array_equal(boxes, rows[:, :, None] & cols[:, None, :])
    # Contiguous: at most one rising edge.
    for edges in (rows, cols):
        padded = np.pad(edges, ((0, 0), (1, 0)))
        assert (np.diff(padded.astype(int), axis=1) == 1).sum(1).max() <= 1
    assert not boxes[0].any()
    # A box that no border clips has the area asked for, up to a pixel of rounding at each side.
    inside = ~(rows[:, 0] | rows[:, -1] | cols[:, 0] | cols[:, -1]) & rows.any(1)
    assert inside.sum() > 50
    side = np.sqrt(np.asarray(area)[inside])
    np.testing.assert_allclose(rows[inside].sum(1), side * 32, atol=1)
    np.testing.assert_allclose(cols[inside].sum(1), side * 48, atol=1)


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.0, 0.0)])
def test_targets_say_what_the_images_hold(mixup_alpha, cutmix_alpha):
    b = 64
    images = jnp.eye(b)[:, None, None, :] * jnp.ones((b, 16, 16, 1))  # Channel i holds image i alone.
    mixed, targets = mix(
        jax.random.key(1),
        images,
        jnp.eye(b),
        mixup_alpha=mixup_alpha,
        cutmix_alpha=cutmix_alpha,
        switch_probability=0.5,
    )
    chex.assert_trees_all_close(mixed.mean((1, 2)), targets, atol=1e-5)
    chex.assert_trees_all_close(targets.sum(1), jnp.ones(b), atol=1e-5)
    partners = jnp.arange(b) ^ 1
    chex.assert_trees_all_close(targets[jnp.arange(b), partners], targets[partners, jnp.arange(b)], atol=1e-6)
    constant = jnp.all(mixed == mixed[:, :1, :1], axis=(1, 2, 3))  # Mixup leaves images constant.
    mixed_at_all = targets.max(1) < 1
    assert bool(jnp.any(mixed_at_all)) == (mixup_alpha + cutmix_alpha > 0)
    if mixup_alpha and cutmix_alpha:  # Both occur, about half and half.
        assert 0.2 < float(jnp.mean(constant & mixed_at_all)) < 0.8


def test_weights_follow_the_beta_distribution():
    b, alpha = 4000, 0.8
    images = jnp.zeros((b, 1, 1, 1))
    targets = jax.nn.one_hot(jnp.arange(b) % 2, 2)
    _, soft = mix(
        jax.random.key(2), images, targets, mixup_alpha=alpha, cutmix_alpha=0.0, switch_probability=0.5
    )
    weight = np.asarray(soft[::2, 0], np.float64)
    np.testing.assert_allclose(weight.mean(), 0.5, atol=0.02)
    np.testing.assert_allclose(weight.var(), 1 / (4 * (2 * alpha + 1)), atol=0.01)
