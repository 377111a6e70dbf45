from functools import partial

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from tests.ops.cases import random_case
from vir_jax.ops import retention, retention_2d
from vir_jax.ops.kernels import PLATFORMS


@pytest.fixture(autouse=True)
def _no_shape_types():
    """The tests' shape checks off, so that what a user would meet is met here."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


CASE = random_case(n=12)
Q, K, V, LOG_DECAY, STATE = CASE.arguments

WRONG = {
    "rank": ({"q": Q[0]}, r"rank 4.*q \(12, 3, 8\), k \(2, 12, 3, 8\)"),
    "key width": ({"k": K[..., :4]}, r"one shape.*k \(2, 12, 3, 4\)"),
    "heads": ({"v": V[:, :, :2]}, r"batch, tokens and heads.*v \(2, 12, 2, 5\)"),
    "tokens": ({"v": V[:, :7]}, r"batch, tokens and heads.*v \(2, 7, 3, 5\)"),
    "empty": ({"q": Q[:, :0], "k": K[:, :0], "v": V[:, :0]}, r"must not be empty"),
    "dtype": ({"q": Q.astype(int)}, r"q has dtype int32; expected one of float32, bfloat16, float16"),
    "mode": (
        {"mode": "chunk"},
        r"unknown mode 'chunk'; expected one of 'parallel', 'recurrent', 'chunkwise'",
    ),
    "scale": ({"scale": jnp.ones(())}, r"scale is .*expected a Python number"),
    "decay shape": ({"log_decay": LOG_DECAY[:2]}, r"log_decay has shape \(2,\); expected \(3,\)"),
    "decay dtype": ({"log_decay": LOG_DECAY.astype(jnp.bfloat16)}, r"dtype bfloat16; expected float32"),
    "decay above one": ({"log_decay": -LOG_DECAY}, r"expected decays in \(0, 1\].*pass log\(gamma\)"),
    "decay of zero": ({"log_decay": jnp.full(3, -jnp.inf)}, r"decays \[0.0, 0.0, 0.0\]; expected"),
    "decay of nan": ({"log_decay": jnp.full(3, jnp.nan)}, r"expected decays in \(0, 1\]"),
}
TOKENS = jnp.broadcast_to(LOG_DECAY, (2, 12, 3))
SEQUENCE = {
    "decays of some tokens": (
        {"log_decay": TOKENS[:, 1:]},
        r"shape \(2, 11, 3\); expected \(3,\), one per head of q, or \(2, 12, 3\), one per token, too",
    ),
    "a token's decay above one": (
        {"log_decay": TOKENS.at[0, 3, 1].set(0.5)},
        r"log_decay has \[0.5\], the logarithm of decays \[1.64.*\]; expected decays in \(0, 1\]",
    ),
    "chunk of zero": ({"chunk_size": 0}, r"chunk_size is 0; expected a positive integer"),
    "chunks of a mode without": (
        {"chunk_size": 3, "mode": "parallel"},
        r"chunk_size is 3 and the mode 'parallel', which has no chunks; leave chunk_size out, or use mode='chunkwise'",
    ),
    "chunks of single tokens": (
        {"chunk_size": 3, "mode": "recurrent"},
        r"the mode 'recurrent', which has no chunks",
    ),
    "fraction of a chunk": ({"chunk_size": 2.5}, r"chunk_size is 2.5; expected a positive integer"),
    "state shape": (
        {"initial_state": STATE[:1]},
        r"state has shape \(1, 3, 8, 5\); expected \(2, 3, 8, 5\)",
    ),
    "state dtype": (
        {"initial_state": STATE.astype(jnp.bfloat16)},
        r"state has dtype bfloat16; expected float32",
    ),
}
GRID = {
    "decays per token": (
        {"log_decay": TOKENS},
        r"shape \(2, 12, 3\), a decay per token.*retention_2d takes one per head, \(3,\): use it, or retention",
    ),
    "too large": ({"grid": (4, 4)}, r"4 rows by 4 columns has 16 patches, but there are 12 tokens"),
    "one side": ({"grid": (12,)}, r"grid is \(12,\); expected \(rows, cols\)"),
    "negative": ({"grid": (-1, 3)}, r"grid is -1 rows by 3 columns"),
    "no column": ({"grid": (3, 0)}, r"grid is 3 rows by 0 columns"),
    "chunks of a mode without": (
        {"chunk_rows": 3, "mode": "parallel"},
        r"chunk_rows is 3 and the mode 'parallel', which has no chunks; leave chunk_rows out",
    ),
    "chunks of single tokens": (
        {"chunk_rows": 3, "mode": "recurrent"},
        r"the mode 'recurrent', which has no chunks",
    ),
    "chunk of zero": ({"chunk_rows": 0}, r"chunk_rows is 0; expected a positive integer"),
    "state shape": ({"initial_state": STATE}, r"state has shape \(2, 3, 8, 5\); expected \(2, 3, 4, 8, 5\)"),
}


def _call(op, change):
    arguments = {"q": Q, "k": K, "v": V, "log_decay": LOG_DECAY} | change
    positional = [arguments.pop(name) for name in ("q", "k", "v", "log_decay")]
    return op(*positional, **arguments)


@pytest.mark.parametrize(("change", "message"), (WRONG | SEQUENCE).values(), ids=WRONG | SEQUENCE)
def test_retention_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        _call(retention, change)


@pytest.mark.parametrize(("change", "message"), (WRONG | GRID).values(), ids=WRONG | GRID)
def test_retention_2d_says_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        _call(retention_2d, {"grid": (3, 4)} | change)


@pytest.mark.parametrize("name", PLATFORMS)
def test_kernels_take_no_decay_per_token(name, monkeypatch):
    monkeypatch.setitem(PLATFORMS, name, jax.default_backend())
    message = (
        rf"'{name}' takes one decay per head, \(3,\), and log_decay has shape \(2, 12, 3\), one per token"
    )
    with pytest.raises(ValueError, match=message):
        _call(retention, {"log_decay": TOKENS, "implementation": name})


def test_errors_come_while_tracing():
    shape = partial(jax.eval_shape, partial(retention, mode="chunkwise", chunk_size=0))
    with pytest.raises(ValueError, match="chunk_size is 0"):
        shape(Q, K, V, LOG_DECAY)
    wrong = -LOG_DECAY
    closed_over = jax.jit(lambda q: retention(q, K, V, wrong))
    with pytest.raises(ValueError, match="expected decays in"):
        closed_over(Q)


def test_traced_decays_are_taken_as_they_are():
    out, _ = jax.jit(retention)(Q, K, V, -LOG_DECAY)
    assert out.shape == V.shape
