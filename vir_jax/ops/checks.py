"""What the public functions ask of their arguments. Every failure is a ValueError, at trace time."""

from numbers import Integral, Real

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

MODES = ("parallel", "recurrent", "chunkwise")
DTYPES = ("float32", "bfloat16", "float16")


def check_mode(mode: str) -> None:
    """Check that `mode` is one of MODES, or "auto"."""
    if mode not in (*MODES, "auto"):
        raise ValueError(f"unknown mode {mode!r}; expected one of {', '.join(map(repr, MODES))} or 'auto'")


def check_chunk(name: str, size: int | None, mode: str) -> None:
    """Check that the size of a chunk is a positive integer, for a mode that has chunks; or None."""
    if size is None:
        return
    if not (isinstance(size, Integral) and size >= 1):
        raise ValueError(f"{name} is {size!r}; expected a positive integer, or None for the default")
    if mode not in ("chunkwise", "auto"):
        raise ValueError(
            f"{name} is {size} and the mode {mode!r}, which has no chunks; leave {name} out, or use mode='chunkwise'"
        )


def check_scale(scale: float | None) -> None:
    """Check that `scale` is a number, or None."""
    if scale is not None and not isinstance(scale, Real):
        raise ValueError(
            f"scale is {scale!r}; expected a Python number, or None for d^-1/2: to trace it, multiply q"
        )


def check_tokens(q: Float[Array, "..."], k: Float[Array, "..."], v: Float[Array, "..."]) -> None:
    """Check that q and k are [b, n, h, d], v is [b, n, h, e], nowhere empty, in one of DTYPES each."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must have rank 4, [batch, tokens, heads, width]; got {shapes}")
    if q.shape != k.shape:
        raise ValueError(f"q and k must have one shape, [batch, tokens, heads, key width]; got {shapes}")
    if q.shape[:3] != v.shape[:3]:
        raise ValueError(f"q, k and v must agree in batch, tokens and heads; got {shapes}")
    if 0 in (*q.shape, *v.shape):
        raise ValueError(f"q, k and v must not be empty; got {shapes}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype.name not in DTYPES:
            raise ValueError(
                f"{name} has dtype {x.dtype}; expected one of {', '.join(DTYPES)}: cast it first"
            )


def check_log_decay(
    log_decay: Float[Array, "..."], heads: int, tokens: tuple[int, int] | None = None
) -> None:
    """Check that log_decay is [heads] fp32, and 0 < gamma <= 1 wherever its values are known.

    With (batch, number) of tokens it may be [batch, number, heads], too.

    They are known in eager code and where a trace closes over a constant. Of an argument of `jit`, `grad` or `vmap`
    they are not, nor of an array spread over several processes; then shape and dtype alone are checked.
    """
    if log_decay.ndim == 3 and tokens is None:
        raise ValueError(
            f"log_decay has shape {log_decay.shape}, a decay per token, which is defined along a sequence; "
            f"retention_2d takes one per head, ({heads},): use it, or retention"
        )
    per_token = None if tokens is None else (*tokens, heads)
    if log_decay.shape not in ((heads,), per_token):
        also = "" if per_token is None else f", or {per_token}, one per token, too"
        raise ValueError(
            f"log_decay has shape {log_decay.shape}; expected ({heads},), one per head of q{also}"
        )
    if log_decay.dtype != jnp.float32:
        raise ValueError(
            f"log_decay has dtype {log_decay.dtype}; expected float32, for 16 bits round a decay to 1"
        )
    if isinstance(log_decay, jax.core.Tracer) or not getattr(log_decay, "is_fully_addressable", True):
        return
    values = np.asarray(log_decay)
    wrong = values[~(np.isfinite(values) & (values <= 0))][:heads]
    if wrong.size:
        raise ValueError(
            f"log_decay has {wrong.tolist()}, the logarithm of decays {np.exp(wrong).tolist()}; expected decays "
            "in (0, 1], so finite logarithms of at most 0: pass log(gamma), not gamma"
        )


def check_state(state: Float32[Array, "..."] | None, shape: tuple[int, ...]) -> None:
    """Check that the state which comes in has this shape and is fp32, or is None."""
    if state is None:
        return
    if state.shape != shape:
        raise ValueError(f"the state has shape {state.shape}; expected {shape} for these q, k and v")
    if state.dtype != jnp.float32:
        raise ValueError(f"the state has dtype {state.dtype}; expected float32, whatever q, k and v have")


def check_grid(grid: tuple[int, int], tokens: int) -> None:
    """Check that `grid` is (rows, cols) of at most so many tokens; no rows at all leaves trailing ones."""
    if len(grid) != 2 or not all(isinstance(side, Integral) for side in grid):
        raise ValueError(f"grid is {grid!r}; expected (rows, cols), two integers")
    rows, cols = grid
    if rows < 0 or cols < 1:
        raise ValueError(
            f"grid is {rows} rows by {cols} columns; expected no negative rows and at least one column"
        )
    if rows * cols > tokens:
        raise ValueError(
            f"a grid of {rows} rows by {cols} columns has {rows * cols} patches, but there are {tokens} tokens; "
            "expected every patch in row-major order, then any trailing tokens"
        )
