"""Convolutions of images, by the form that the platform computes fast."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vir_jax.models.linear import product


def convolve(
    images: Float[Array, "b H W c"],
    kernel: Float[Array, "p q c d"],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "b rows cols d"]:
    """Convolve images with a kernel.

    XLA computes a convolution's gradients on CPUs several times slower than the product of windows and kernel, which
    takes its place there; elsewhere it is XLA's own.

    Args:
        images: of the kernel's dtype.
        kernel: of p x q pixels.
        stride: in rows and columns.
        padding: zeros before and after, in rows and columns.
    """
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    return jax.lax.platform_dependent(
        images,
        kernel,
        cpu=lambda images, kernel: product(
            _windows(images, kernel.shape[:2], stride), kernel.reshape(-1, kernel.shape[-1])
        ),
        default=lambda images, kernel: jax.lax.conv_general_dilated(
            images, kernel, stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
    )


def _windows(
    images: Float[Array, "b H W c"], size: Sequence[int], stride: Sequence[int]
) -> Float[Array, "b rows cols pixels"]:
    """Return the pixels below each place of the kernel side by side, in the kernel's order."""
    b, height, width, c = images.shape
    (p, q), (s, t) = size, stride
    rows, cols = (height - p) // s, (width - q) // t
    return jnp.concatenate(
        [
            jax.lax.slice(images, (0, i, j, 0), (b, i + s * rows + 1, j + t * cols + 1, c), (1, s, t, 1))
            for i in range(p)
            for j in range(q)
        ],
        axis=-1,
    )
