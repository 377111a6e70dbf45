"""What the makers say of their chips: peak speed and memory."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts them.

    Attributes:
      peak_flops: dense bfloat16, FLOP/s.
      memory: bytes of HBM.
      bandwidth: of it, bytes/s.
    """

    peak_flops: float
    memory: int
    bandwidth: float


GIB = 2**30

# By `device_kind`, from the makers' public data sheets.
CHIPS = {
    "TPU v4": Chip(275e12, 32 * GIB, 1.23e12),
    "TPU v5 lite": Chip(197e12, 16 * GIB, 0.82e12),
    "TPU v5": Chip(459e12, 95 * GIB, 2.77e12),
    "TPU v6 lite": Chip(918e12, 32 * GIB, 1.64e12),
    "NVIDIA A100-SXM4-40GB": Chip(312e12, 40 * GIB, 1.56e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 80 * GIB, 2.04e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 80 * GIB, 3.35e12),
    "NVIDIA H200": Chip(989e12, 141 * GIB, 4.8e12),
}
