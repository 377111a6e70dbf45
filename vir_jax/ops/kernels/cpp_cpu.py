"""Retention over a sequence on CPUs: C++ that the machine's own compiler builds, called through XLA's FFI.

The chunkwise form (docs/method.md, section 1). XLA multiplies the small matrices of a chunk on one core, and moves each
chunk through memory several times; here a thread takes a head through its sequence, its state and chunk in the caches
of its core. Products and sums are fp32, whatever the inputs are.

The compiler is `c++`, or what the environment's CXX names: GCC from 10 on, or Clang. It takes some seconds, once in a
process; nothing is kept on disk, for a home directory may be that of other processors, too.
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

TARGET = "vir_jax_retention"  # The handler's name in the source, and XLA's for it.
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
    with BUILDING:
        _register()
    (b, _, h, d), e = q.shape, v.shape[-1]
    state = jax.ShapeDtypeStruct((b, h, d, e), jnp.float32)
    call = jax.ffi.ffi_call(
        TARGET, (jax.ShapeDtypeStruct(v.shape, jnp.float32), state), vmap_method="sequential"
    )
    q, k, fp32_v = (x.astype(jnp.float32) for x in (q, k, v))
    arriving = jnp.zeros(state.shape, state.dtype) if arriving is None else arriving
    out, final = call(q, k, fp32_v, log_decay, arriving, reverse=np.bool_(reverse))
    return out.astype(v.dtype), final if with_final else None


@functools.cache
def _register() -> None:
    """Build the kernel and make it known to XLA, once in a process."""
    with tempfile.TemporaryDirectory() as folder:
        library = ctypes.cdll.LoadLibrary(str(_build(Path(folder) / "retention.so")))
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(getattr(library, TARGET)), platform="cpu")


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
