"""A pyramid on CIFAR-10 in half an hour of one CPU core: 0.5 M parameters that stream.

    python -m vir_jax.data.prepare --dataset=cifar10
    python -m benchmarks.ablation benchmarks/grids/cifar10_half_hour.py

Cost: half an hour of one CPU core a seed, 20 minutes of two.
"""

RECIPE = "configs/vir_h_cifar10.py:model=vir_h_micro,epochs=30"
SEEDS = (0, 1, 2)
COMMON = {"eval_every": 1953}  # A sixth of the 11,718 steps.
ROWS = {"vir_h_micro": {}}
