"""Retention over a sequence: one function for every mode."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array, Float, Float32

from vir_jax.ops.checks import (
    check_chunk,
    check_log_decay,
    check_mode,
    check_scale,
    check_state,
    check_tokens,
)
from vir_jax.ops.decay import Decays
from vir_jax.ops.gradient import Form, differentiable
from vir_jax.ops.kernels import PLATFORMS, chosen_kernel, kernel_form
from vir_jax.ops.platform import platform
from vir_jax.ops.sequence_chunkwise import chunkwise
from vir_jax.ops.sequence_parallel import parallel
from vir_jax.ops.sequence_recurrent import recurrent

# By platform, with 12 heads of 64. CPU: measured on two cores (benchmarks/results/retention.md). GPU: XLA's forms on an
# H200 (docs/speed.md), between 197 tokens, where the masked einsum was ahead, and 1,025. TPU: estimated by the
# compiler for v5e and v6e, values and gradients weighed alike (benchmarks/results/tpu_modes.md); none has run it.
PARALLEL_UP_TO = {"cpu": 96, "gpu": 240, "tpu": 768}
CHUNK_SIZES = {"cpu": 32, "gpu": 64, "tpu": 256}
CHUNK_SIZE = 64
"""That multiply-adds are counted with, wherever the model runs."""


def retention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    *,
    mode: str = "auto",
    chunk_size: int | None = None,
    initial_state: Float32[Array, "b h d e"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"]]:
    """Compute retention, o_n = scale q_n S_n with S_n = gamma S_{n-1} + k_n^T v_n (docs/method.md, section 1).

    Every mode computes this one function, its gradients and its state:

    - "parallel": (Q K^T .* D) V with all n^2 scores at once;
    - "recurrent": one token after another, in the least memory;
    - "chunkwise": parallel inside chunks of `chunk_size` tokens (the last one ragged), recurrent between them;
    - "auto": parallel up to PARALLEL_UP_TO tokens, which the platform decides; chunkwise beyond, and wherever a chunk
      size or a kernel is given.

    Args:
        q: Queries [b, n, h, d]; fp32, bf16 or fp16, as k and v.
        k: Keys [b, n, h, d].
        v: Values [b, n, h, e].
        log_decay: log(gamma) per head, [h] fp32, at most 0; or per head and token, [b, n, h]: what the state decays by
            before the token is added, S_n = gamma_n S_{n-1} + k_n^T v_n. Values are checked where they are known when
            tracing.
        mode: One of MODES, or "auto".
        chunk_size: Tokens in a chunk, in the modes "chunkwise" and "auto". None is that of CHUNK_SIZES.
        initial_state: The state S after the tokens before these, [b, h, d, e] fp32, as a call with those returned it;
            None is zero. So tokens may come in any number at a time, one by one too.
        scale: What multiplies q, in q's dtype. None is d^-1/2.
        implementation: "xla", or a kernel for the chunkwise mode: "pallas_tpu" on TPUs, "mosaic_gpu" on NVIDIA
            Hopper GPUs, "cpp_cpu" on CPUs, where there is a C++ compiler. None is "xla", but for what `chosen_kernel`
            has been measured to compute faster, on one device, without a chunk size. Where a mesh of several devices
            is set, a kernel wants `jax.shard_map` around it; models see to that. Kernels take decays per head alone.

    Returns:
        The output [b, n, h, e] in v's dtype, and the state after the last token, [b, h, d, e] fp32, which costs
        nothing under `jit` where it is not used. Decays, scores, states and sums are fp32 whatever the inputs are,
        and products as exact as the inputs (see `contract`).

    The gradient (see `gradient`) runs in the same mode, stores nothing but the arguments, and can be differentiated
    again in reverse. Forward differentiation (`jax.jvp`) is not defined.

    Raises:
        ValueError: wrong ranks, shapes, dtypes, mode, chunk size or scale; a chunk size for a mode without chunks; a
            known decay outside (0, 1]; a kernel that does not exist, is not for this mode or platform, or would
            compute everything on every device; a kernel and decays per token.
        RuntimeError: "cpp_cpu" was not built: no compiler is there, or it failed.
    """
    check_mode(mode)
    check_chunk("chunk_size", chunk_size, mode)
    check_implementation(implementation, mode, chunk_size=chunk_size)
    check_scale(scale)
    check_tokens(q, k, v)
    b, n, h, d = q.shape
    check_log_decay(log_decay, h, (b, n))
    check_state(initial_state, (b, h, d, v.shape[-1]))
    if implementation in PLATFORMS and log_decay.ndim == 3:
        raise ValueError(
            f"{implementation!r} takes one decay per head, ({h},), and log_decay has shape {log_decay.shape}, one per "
            "token; use implementation='xla'"
        )
    if (
        implementation is None
        and log_decay.ndim == 1
        and mode in ("auto", "chunkwise")
        and chunk_size is None
    ):
        implementation = _fastest(jnp.result_type(q, k, v), n, max(d, v.shape[-1]))
    kernel = implementation if implementation in PLATFORMS else None
    return _retention(q, k, v, log_decay, initial_state, mode, chunk_size, scale, kernel)


@partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _retention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b n h d"],
    v: Float[Array, "b n h e"],
    log_decay: Decays,
    initial_state: Float32[Array, "b h d e"] | None,
    mode: str,
    chunk_size: int | None,
    scale: float | None,
    kernel: str | None,
) -> tuple[Float[Array, "b n h e"], Float32[Array, "b h d e"]]:
    q, k = scaled(q, k, scale)
    first = log_decay[:, 0] if log_decay.ndim == 3 else log_decay
    arriving = None if initial_state is None else jnp.exp(first)[..., None, None] * initial_state
    form = kernel_form(kernel) if kernel else choose_form(mode, q.shape[1], chunk_size)
    return differentiable(form, q, k, v, log_decay, arriving)


def check_implementation(implementation: str | None, mode: str, **chunk: int | None) -> None:
    """Raise ValueError unless a kernel can do what is asked for, here; `chunk` is an argument for XLA's chunks."""
    if implementation in (None, "xla"):
        return
    if implementation not in PLATFORMS:
        known = ", ".join(map(repr, ("xla", *PLATFORMS)))
        raise ValueError(f"unknown implementation {implementation!r}; expected one of {known}, or None")
    [(argument, size)] = chunk.items()
    if mode not in ("auto", "chunkwise") or size is not None:
        raise ValueError(
            f"{implementation!r} computes the chunkwise mode in chunks of its own; got mode {mode!r} and {argument} "
            f"{size}: leave both out, or use implementation='xla'"
        )
    if platform() != PLATFORMS[implementation]:
        raise ValueError(
            f"{implementation!r} is a kernel for {PLATFORMS[implementation]}, and this compiles for {platform()}; use "
            "implementation='xla'"
        )
    split = _split_axes()
    if split:
        raise ValueError(
            f"{implementation!r} is not split over a mesh by itself, and each device of {split} would compute "
            "everything: call it within `jax.shard_map` over batch and heads, as models do, or use implementation='xla'"
        )


def _split_axes() -> dict[str, int]:
    """Return the axes of the mesh in context, and their devices, over which a kernel is not split by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {
        axis: mesh.shape[axis] for axis, kind in kinds if kind != AxisType.Manual and mesh.shape[axis] > 1
    }


def scaled(
    q: Float[Array, "b n h d"], k: Float[Array, "b n h d"], scale: float | None
) -> tuple[Float[Array, "b n h d"], Float[Array, "b n h d"]]:
    """Return scale * q (d^-1/2 unless told otherwise) and k, in one dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = jnp.promote_types(q.dtype, k.dtype)
    return (float(scale) * q.astype(jnp.float32)).astype(dtype), k.astype(dtype)


def choose_form(mode: str, n: int, chunk_size: int | None = None) -> Form:
    """Return the form that `mode` names; for "auto" the one that suits n tokens, or is asked for by a chunk size."""
    if mode == "auto":
        mode = "parallel" if chunk_size is None and n <= PARALLEL_UP_TO[platform()] else "chunkwise"
    if mode == "chunkwise":
        return partial(chunkwise, chunk_size=chunk_size or CHUNK_SIZES[platform()])
    return parallel if mode == "parallel" else recurrent


def _fastest(dtype: Any, n: int, width: int) -> str | None:
    """Return what `chosen_kernel` says; None where a kernel is not split over the mesh in context by itself."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    device_kind = jax.devices()[0].device_kind if device is None else device.device_kind
    return None if _split_axes() else chosen_kernel(device_kind, dtype, n, width)
