"""What the gradient costs, and how exact it is where sums are long."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.cases import assert_close, random_case
from vir_jax.ops import (
    MODES,
    grid_chunkwise,
    grid_parallel,
    grid_recurrent,
    retention,
    retention_2d,
)
from vir_jax.ops.gradient import _retention, differentiable
from vir_jax.ops.reference import naive_retention_gradients
from vir_jax.ops.sequence_chunkwise import chunkwise
from vir_jax.ops.sequence_parallel import parallel
from vir_jax.ops.sequence_recurrent import recurrent

EVERYTHING = tuple(range(5))


def _compiled(n, argnums, op=retention, b=1, h=12, d=64, state=(64, 64), **options):
    shapes = [(b, n, h, d)] * 3 + [(h,), (b, h, *state)]

    def loss(q, k, v, log_decay, initial_state):
        out, final = op(q, k, v, log_decay, initial_state=initial_state, **options)
        return jnp.sum(out**2) + jnp.sum(final**2)

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(*inputs).compile()
    return compiled, 4 * 4 * np.prod(shapes[0])


@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_memory_is_a_few_times_the_arguments_and_linear(mode):
    temp = {}
    for n in (8192, 16384):
        compiled, qkvo = _compiled(n, EVERYTHING, mode=mode)
        temp[n] = compiled.memory_analysis().temp_size_in_bytes
        assert temp[n] <= 8 * qkvo
    assert temp[16384] <= 2 * temp[8192]


@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_memory_of_a_grid_holds_no_state_per_token(mode):
    compiled, qkvo = _compiled(
        64 * 64, EVERYTHING, op=retention_2d, state=(64, 64, 64), grid=(64, 64), mode=mode
    )
    # A state per token would be 64 * 64 numbers for each token and head: 16 times q, k, v and o.
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * qkvo


def test_a_constant_decay_costs_no_gradient():
    constant, _ = _compiled(1024, (0, 1, 2), mode="chunkwise")
    learned, _ = _compiled(1024, (0, 1, 2, 3), mode="chunkwise")
    assert constant.cost_analysis()["flops"] < 0.85 * learned.cost_analysis()["flops"]
    assert constant.as_text().count(" while(") < learned.as_text().count(" while(")


GRID = (4, 16)
FORMS = {
    "parallel": parallel,
    "recurrent": recurrent,
    "chunkwise": partial(chunkwise, chunk_size=16),
    "grid, parallel": partial(grid_parallel.parallel, grid=GRID),
    "grid, recurrent": partial(grid_recurrent.recurrent, grid=GRID),
    "grid, chunkwise": partial(grid_chunkwise.chunkwise, grid=GRID, tile_size=(1, 8)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_state_that_nobody_uses_costs_nothing(form):
    case = random_case(n=64)

    def cost(op):
        def loss(*arguments):
            return jnp.sum(op(*arguments, None)[0] ** 2)

        compiled = jax.jit(jax.value_and_grad(loss, range(4))).lower(*case.arguments[:4]).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    assert cost(partial(differentiable, form)) == cost(partial(_retention, form, 0, False, False))


@pytest.mark.parametrize("op", [retention, partial(retention_2d, grid=(3, 4))])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_through_the_state_alone(op, mode):
    case = random_case(n=12)

    def gradients(pick):
        return jax.jit(jax.grad(lambda *x: pick(*op(*x, mode=mode)), range(4)))(*case.arguments[:4])

    by_state = gradients(lambda out, state: jnp.sum(jnp.sin(state)))
    with_output = gradients(lambda out, state: jnp.sum(jnp.sin(state)) + 0.0 * jnp.sum(out))
    assert_close(by_state[1:], with_output[1:], 3e-6)
    assert not by_state[0].any()


@pytest.mark.parametrize("mode", ["chunkwise", "recurrent"])
def test_decay_gradient_of_a_long_sequence_is_exact(mode):
    case = random_case(b=1, n=16384, h=2, d=4, e=4)

    def loss(log_decay):
        out, _ = retention(*case.tokens, log_decay, mode=mode, initial_state=case.initial_state)
        return jnp.sum(out**2) / 2, out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(case.log_decay)
    arrays = map(np.asarray, (*case.arguments, out, jnp.zeros_like(case.d_final)))
    # Over the whole sequence, sum_n n (q_n . dq_n - k_n . dk_n) would lose three digits of this.
    np.testing.assert_allclose(gradient, naive_retention_gradients(*arrays).log_decay, rtol=2e-6)


def test_forward_differentiation_is_refused():
    case = random_case(n=4)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda q: retention(q, case.k, case.v, case.log_decay), (case.q,), (case.q,))
