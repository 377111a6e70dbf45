"""A part of a batch draws what the whole batch would have drawn for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vir_jax.training.example_keys import example_key

KEY = jax.random.key(3, impl="threefry2x32")
DRAWS = {
    "bernoulli": lambda key, n: jax.random.bernoulli(key, 0.5, (n, 3)),
    "normal": lambda key, n: jax.random.normal(key, (n, 2, 2)),
    "uniform": lambda key, n: jax.random.uniform(key, (n,)),
    "after a split": lambda key, n: jax.random.normal(jax.random.split(key)[1], (n, 2)),
    "after a fold": lambda key, n: jax.random.normal(jax.random.fold_in(key, 7), (n, 2)),
    "16 bits": lambda key, n: jax.random.bits(key, (n, 5), jnp.uint16),
}


@pytest.mark.parametrize("name", DRAWS)
def test_parts_and_slices_draw_what_the_whole_does(name):
    draw = DRAWS[name]
    whole = np.asarray(draw(example_key(KEY), 12))
    np.testing.assert_array_equal(draw(example_key(KEY, start=4), 4), whole[4:8])
    np.testing.assert_array_equal(draw(example_key(KEY, start=6, step=3), 2), whole[6:12:3])
    np.testing.assert_array_equal(draw(example_key(KEY, start=5), 1), whole[5:6])


def test_examples_and_keys_draw_differently():
    draws = np.asarray(jax.random.normal(example_key(KEY), (64, 8)))
    assert len(np.unique(draws)) == draws.size
    other = jax.random.normal(example_key(jax.random.key(4, impl="threefry2x32")), (64, 8))
    assert not np.any(draws == np.asarray(other))
    first, second = (jax.random.normal(key, (64, 8)) for key in jax.random.split(example_key(KEY)))
    assert not np.any(np.asarray(first) == np.asarray(second))


def test_one_number_for_all_is_drawn_by_any_part():
    assert jax.random.uniform(example_key(KEY)) == jax.random.uniform(example_key(KEY, start=9))
