"""What the operators are compiled for."""

import jax


def platform() -> str:
    """Return what is compiled for: "cpu", "tpu" or "gpu", as which any other accelerator counts.

    That of the mesh in context, whose devices need not be on this machine, or else of JAX's default device.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return name if name in ("cpu", "tpu") else "gpu"
