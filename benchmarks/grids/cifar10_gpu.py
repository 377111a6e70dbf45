"""The rows of cifar10.py, beside this file, on a GPU, which takes a batch of 128 at once and not in slices of 16.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/cifar10_gpu.py --seeds 0

Not run.
"""

from benchmarks.grids import cifar10

RECIPE, SEEDS, ROWS = cifar10.RECIPE, cifar10.SEEDS, cifar10.ROWS
COMMON = {**cifar10.COMMON, "accumulation_steps": 1}
