import jax.numpy as jnp
import numpy as np
import pytest

from tests.inspection.models import batch, forward, model
from tests.models.helpers import lively
from tests.ops.cases import random_case
from vir_jax.inspection import decay_at_arrival, effective_rank, state_bytes, states_as_read, summarize_states
from vir_jax.inspection.state import patches_held
from vir_jax.ops import retention, retention_2d, vir_log_decay


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    turn, _ = np.linalg.qr(rng.normal(size=(6, 6)))
    three = turn @ np.diag([2.0, 2, 2, 0, 0, 0])
    states = jnp.asarray(np.stack([turn, three, np.outer(turn[0], turn[1]), np.zeros((6, 6))]), jnp.float32)
    np.testing.assert_allclose(effective_rank(states), [6, 3, 1, 0], atol=1e-4)
    p = np.array([0.75, 0.25])
    np.testing.assert_allclose(
        effective_rank(jnp.diag(jnp.float32(p))), np.exp(-(p * np.log(p)).sum()), rtol=1e-5
    )


def test_patches_held_counts_equal_weights_and_is_bounded_by_the_decay():
    np.testing.assert_allclose(
        patches_held(jnp.float32([[1, 1, 1, 0], [5, 0, 0, 0], [0, 0, 0, 0]])), [3, 1, 0]
    )
    log_decay = vir_log_decay(2)
    gamma = np.exp(np.asarray(log_decay, np.float64))
    decay = decay_at_arrival(log_decay, 2000, (1, 2000), "1d")
    np.testing.assert_allclose(patches_held(decay[:, -1])[0], (1 + gamma[0]) / (1 - gamma[0]), rtol=1e-4)


@pytest.mark.parametrize("kind", ["1d", "2d"])
def test_summaries_are_those_of_the_operators_state(kind):
    case, grid = random_case(n=12, d=4, e=6), (3, 4)
    summary = summarize_states(case.k, case.v, decay_at_arrival(case.log_decay, 12, grid, kind))
    assert summary.norm.shape == (2, 3, 13)
    for read in (4, 8, 12):
        tokens = (x[:, :read] for x in case.tokens)
        if kind == "1d":
            _, state = retention(*tokens, case.log_decay)
        else:
            _, state = retention_2d(*tokens, case.log_decay, grid=(read // 4, 4))
            state = state[:, :, -1]
        state = np.asarray(state, np.float64)
        np.testing.assert_allclose(summary.norm[..., read], np.linalg.norm(state, axis=(2, 3)), rtol=1e-5)
        share = np.linalg.svd(state, compute_uv=False)
        share /= share.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(
            summary.effective_rank[..., read], np.exp(-(share * np.log(share)).sum(axis=-1)), rtol=1e-4
        )
    assert not any(np.any(field[..., 0]) for field in summary)
    np.testing.assert_allclose(summary.patches_held[..., 1], 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["2d", "bidirectional", "gained"])
def test_states_of_a_model(kind):
    summary = states_as_read(model(kind), batch())
    patches = 24 if kind == "bidirectional" else 12
    assert summary.norm.shape == (2, 4, 4, patches + 1)
    k, v = (forward(kind)[f"blocks.1.mixer.{name}"][:, :-1] for name in "kv")
    log_decay = model(kind).block(1).mixer.log_decay
    assert kind == "gained" or (log_decay == vir_log_decay(4)).all()
    decay = decay_at_arrival(log_decay, patches, (3, 4), "2d" if kind == "2d" else "1d")[:, -1]
    last = np.einsum("hm,bmhd,bmhe->bhde", decay, k, v)
    np.testing.assert_allclose(summary.norm[:, 1, :, -1], np.linalg.norm(last, axis=(2, 3)), rtol=1e-4)


def test_bytes_do_not_depend_on_the_image_but_for_the_columns_in_2d():
    assert state_bytes(model("1d"), (3, 4)) == state_bytes(model("1d"), (30, 40)) == 4 * 4 * 4 * 16 * 16
    assert state_bytes(model("2d"), (3, 4)) == 4 * state_bytes(model("1d"), (3, 4))


def test_attention_has_no_state():
    with pytest.raises(ValueError, match="expected retention"):
        states_as_read(lively("vit_pico2", image_size=(6, 8)), batch())


def test_blocks_that_read_backwards_have_no_state_of_what_was_read():
    with pytest.raises(ValueError, match="flips=True"):
        states_as_read(model("flips"), batch())


def test_bytes_of_a_convolution_are_counted():
    in_2d = state_bytes(model("2d"), (3, 4))
    assert state_bytes(model("convolved"), (3, 4)) == in_2d + 4 * 4 * 2 * 64
