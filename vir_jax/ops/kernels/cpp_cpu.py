"""Retention on CPUs, over a sequence and over a grid: C++ that the machine's own compiler builds, by XLA's FFI.

The chunkwise form (docs/method.md, sections 1 and 2). XLA moves each chunk through memory several times, and multiplies
its small matrices one after the other; here a thread takes a head through its sequence or grid, its state and chunk in
the caches of its core. Products and sums are fp32, whatever the inputs are.

The compiler is `c++`, or what the environment's CXX names; GCC 12 and Clang were tried. It takes some seconds, once in
a process; nothing is kept on disk, for a home directory may be that of other processors, too.
"""

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from vir_jax.ops.grid_state import along_columns, between_columns, empty_grid_state

# The handlers in the source, and XLA's names of them.
SEQUENCE, GRID = "vir_jax_retention", "vir_jax_retention_2d"
SOURCE = Path(__file__).with_suffix(".cc")
BUILDING = threading.Lock()  # XLA takes a target once, and threads may trace at the same time.
FLAGS = ("-std=c++2a", "-O3", "-march=native", "-shared", "-fPIC")


def chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h d e"] | None,
    *,
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"] | None]:
    """Run the kernel as a form: see `gradient` for the signature.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed; its messages are in the error.
    """
    (b, _, h, d), e = q.shape, v.shape[-1]
    arriving = jnp.zeros((b, h, d, e), jnp.float32) if arriving is None else arriving
    out, final = _call(SEQUENCE, q, k, v, log_decay, arriving, reverse)
    return out, final if with_final else None


def grid_chunkwise(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h x d e"] | None,
    *,
    grid: tuple[int, int],
    reverse: bool,
    with_final: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h x d e"] | None]:
    """Run the kernel of 2-D as a form: see `gradient` and `grid_parallel`; errors are those of `chunkwise`."""
    states = empty_grid_state(k, v, grid[1]) if arriving is None else arriving
    if reverse:
        states = along_columns(jnp.flip(states, axis=2), log_decay)
    out, final = _call(GRID, q, k, v, log_decay, states, reverse)
    if not with_final:
        return out, None
    return out, jnp.flip(between_columns(final, log_decay), axis=2) if reverse else final


def _call(
    target: str,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h *x d e"],
    reverse: bool,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h *x d e"]]:
    with BUILDING:
        _register()
    shapes = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (v, arriving))
    call = jax.ffi.ffi_call(target, tuple(shapes), vmap_method="sequential")
    tokens = (x.astype(jnp.float32) for x in (q, k, v))
    out, final = call(*tokens, log_decay, arriving, reverse=np.bool_(reverse))
    return out.astype(v.dtype), final


@functools.cache
def _register() -> None:
    """Build the kernels and make them known to XLA, once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.cdll.LoadLibrary(str(_build(Path(folder) / "retention.so")))
    for target in (SEQUENCE, GRID):
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")


def _build(library: Path) -> Path:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not compiler or shutil.which(compiler[0]) is None:
        raise RuntimeError(
            f"'cpp_cpu' is built by a C++ compiler, and {' '.join(compiler)!r} is not there: install one (on Debian "
            "and Ubuntu, apt install g++), name one by the environment's CXX, or use implementation='xla'"
        )
    command = [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(library)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"'cpp_cpu' was not built; implementation='xla' needs no building. {shlex.join(command)} said:\n"
            f"{ran.stderr}"
        )
    return library
