"""ViR that predicts the pixels of CIFAR-10, and its twin with causal softmax attention, at equal time: bits/dim.

    python -m vir_jax.data.prepare --dataset=cifar10
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.ablation benchmarks/grids/cifar10_pixels.py --seeds 0

About half an hour of training on one CPU core for each of the rows `vir` and `vit`; `vir_same_images` has
seen as many images as `vit` in that time. Bits/dim are of the first 2,000 test images, of the images as the data set
stores them, which may be a JPEG copy: beside published figures they mean nothing.
"""

RECIPE = "configs/vir_cifar10_pixels.py"
SEEDS = (0, 1, 2)
COMMON = {
    "batch_size": 16,
    "accumulation_steps": 16,  # An image at a time: 1,024 tokens, which stay in a core's caches.
    "eval_batch_size": 16,
    "log_every": 10,
    "checkpoint_every": 250,
    "data.eval_split": "test[:2000]",
    "optim.warmup_epochs": 0.02,
}
ROWS = {
    "vir": {"epochs": 0.85, "eval_every": 885},  # 2,656 steps.
    "vit": {"epochs": 0.22, "eval_every": 230, "model.mixer": "causal_softmax"},  # 687 steps.
    "vir_same_images": {"epochs": 0.22, "eval_every": 230},
}
