"""What the public retention functions ask of their arguments; every failure is a ValueError."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

MODES = ("parallel", "recurrent", "chunkwise")
DTYPES = ("float32", "bfloat16", "float16")


def check_mode(mode: str) -> None:
    """`mode` is one of MODES or "auto"."""
    if mode not in (*MODES, "auto"):
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(map(repr, MODES))} or 'auto'")


def check_positive(name: str, value: int | None) -> None:
    """`value` is None or a positive integer."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} is {value!r}; expected a positive integer, or None for the default")


def check_tokens(q: Array, k: Array, v: Array) -> None:
    """q, k are [b, n, h, d] and v is [b, n, h, e], n at least one, in a float dtype of at most 32 bits."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have rank 4, [batch, tokens, heads, width]; got {shapes}")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, [batch, tokens, heads, key width]; got {shapes}")
    if q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v must agree in batch, tokens and heads; got {shapes}")
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"q, k and v must not be empty; got {shapes}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; expected one of {', '.join(DTYPES)}: cast it first"
            )


def check_log_decay(log_decay: Array, heads: int) -> None:
    """log_decay is [h] fp32 with 0 < gamma <= 1; the values are checked wherever they are known.

    They are known in eager code and where a constant is closed over; inside `jit`, `grad` or `vmap` an argument's
    values are not, and its shape and dtype alone are checked.
    """
    if log_decay.shape != (heads,):
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; expected ({heads},), the logarithm of one decay per head of q"
        )
    if log_decay.dtype != jnp.float32:
        raise ValueError(
            f"log_decay has dtype {log_decay.dtype}; expected float32: 16 bits round decays to 1"
        )
    if isinstance(log_decay, jax.core.Tracer):
        return
    if isinstance(log_decay, jax.Array) and not log_decay.is_fully_addressable:
        return
    values = np.asarray(log_decay)
    if not (np.isfinite(values) & (values <= 0)).all():
        raise ValueError(
            f"log_decay must be finite and at most 0, the logarithm of decays in (0, 1]; got {values.tolist()}, "
            f"decays {np.exp(values).tolist()}. Pass log(gamma), not gamma"
        )


def check_state(name: str, state: Array | None, shape: tuple[int, ...]) -> None:
    """`state` is None or fp32 of the given shape."""
    if state is None:
        return
    if state.shape != shape:
        raise ValueError(f"{name} has shape {state.shape}; expected {shape}")
    if state.dtype != jnp.float32:
        raise ValueError(f"{name} has dtype {state.dtype}; expected float32, which a state always is")


def check_grid(grid: tuple[int, int], tokens: int) -> None:
    """`grid` is (rows, cols), not empty, and holds at most as many patches as there are tokens."""
    if len(grid) != 2 or not all(isinstance(side, int) and side >= 1 for side in grid):
        raise ValueError(f"grid is {grid!r}; expected (rows, cols), two positive integers")
    rows, cols = grid
    if rows * cols > tokens:
        raise ValueError(
            f"grid {rows} x {cols} needs {rows * cols} tokens, but there are {tokens}; "
            "tokens are the grid in row-major order, then any trailing ones"
        )
