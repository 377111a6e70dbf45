"""Retention by kernels written for one kind of processor each; `gradient` says what a form is.

`mosaic_gpu` was run on an H100 and an H200, where bfloat16 in it takes a ninth to a fifth of the time of XLA's
chunkwise form (docs/speed.md): there `retention` takes it by itself (`chosen_kernel`). `pallas_tpu` never ran on a TPU:
it was run in interpret mode, where it gives the values, states and gradients of the specification, and compiled for v5e
and v6e; how fast it is is not known, so that it is taken where it is named. A machine that has the accelerator runs
them compiled in tests/ops/test_kernels.py, and `python -m benchmarks.kernels` measures them there. `cpp_cpu` is in C++,
and from 577 tokens on takes 0.3 to 0.6 of the time of XLA's form (docs/speed.md); it, too, is taken where it is named
alone, for it wants a compiler, and some seconds of it.

A kernel computes outputs, states, and the gradients by q, k, v and the state. The gradient by the decay, which is fixed
in ViR, is computed in XLA's chunkwise form.
"""

from functools import partial
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from vir_jax.ops import grid_chunkwise, sequence_chunkwise
from vir_jax.ops.gradient import Form, Result

# What a kernel is written for, by its name, which is its module's too; and those that compute 2-D retention, too.
PLATFORMS = {"mosaic_gpu": "gpu", "pallas_tpu": "tpu", "cpp_cpu": "cpu"}
GRID_KERNELS = ("cpp_cpu",)
HOPPER = ("H100", "H200")
"""What `device_kind` says of the GPUs that `mosaic_gpu` is taken on: those on which it was measured."""
KERNEL_FROM = 128
"""Tokens, from which `mosaic_gpu` is taken: two of its chunks. 197 were the fewest that were measured."""
MEASURED_WIDTH = 64
"""Channels of a head, up to which it is: of fewer it computes as many, filled up with zeros."""


def kernel_form(name: str) -> Form:
    """Return the kernel of that name, to be differentiated forward by the decay, as `gradient` asks of a form."""
    # Here, because importing Pallas takes half a second.
    by_xla = partial(sequence_chunkwise.chunkwise, chunk_size=128)
    return partial(_by_kernel, import_module(f"{__name__}.{name}").chunkwise, by_xla)


def grid_kernel_form(name: str, grid: tuple[int, int]) -> Form:
    """Return the kernel of that name, one of GRID_KERNELS, for a grid; as `kernel_form` does."""
    by_xla = partial(grid_chunkwise.chunkwise, grid=grid, tile_size=(8, 8))
    return partial(_by_kernel, partial(import_module(f"{__name__}.{name}").grid_chunkwise, grid=grid), by_xla)


def chosen_kernel(device_kind: str, dtype: Any, n: int, width: int) -> str | None:
    """Return the kernel that the chunkwise mode takes by itself (see the constants above); None: XLA's form.

    Args:
        device_kind: what is compiled for, as JAX names it.
        dtype: of q, k and v together.
        n: tokens.
        width: the greater of those of keys and values.
    """
    measured = dtype == jnp.bfloat16 and n >= KERNEL_FROM and width <= MEASURED_WIDTH
    return "mosaic_gpu" if measured and any(name in device_kind for name in HOPPER) else None


def _by_kernel(
    kernel: Form, by_xla: Form, *arguments: Array | None, reverse: bool, with_final: bool
) -> Result:
    return _kernel(kernel, by_xla, reverse, with_final, *arguments)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _kernel(
    kernel: Form,
    by_xla: Form,
    reverse: bool,
    with_final: bool,
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Float32[Array, "h"],
    arriving: Float32[Array, "b h *x d e"] | None,
) -> Result:
    # Kernels count in 32 bits: with 64 (`jax_enable_x64`) Pallas would make their indices int64, and not compile them.
    with jax.enable_x64(False):
        return kernel(q, k, v, log_decay, arriving, reverse=reverse, with_final=with_final)


@partial(_kernel.defjvp, symbolic_zeros=True)
def _(
    kernel: Form,
    by_xla: Form,
    reverse: bool,
    with_final: bool,
    primals: tuple[Any, ...],
    tangents: tuple[Any, ...],
) -> tuple[Result, Result]:
    """Differentiate by the decay alone, as `gradient` does with a form; in XLA's chunkwise form."""
    q, k, v, log_decay, arriving = primals

    def of_decay(log_decay: Array) -> Result:
        return by_xla(q, k, v, log_decay, arriving, reverse=reverse, with_final=with_final)

    return jax.jvp(of_decay, (log_decay,), (tangents[3],))
