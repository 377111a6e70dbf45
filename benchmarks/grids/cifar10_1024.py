"""ViR and ViT on CIFAR-10 at one pixel a token, 1,024 tokens, for the same time: what linear cost is worth.

    python -m vir_jax.data.prepare --dataset=cifar10
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.ablation benchmarks/grids/cifar10_1024.py

ViR's epoch and ViT's quarter of one take some 21 minutes of a CPU core each. Run both side by side, a core each, so
that seconds compare. Batches of 32, so that ViT has some hundred steps; its warm-up is the same share of its steps.
Evaluated on 2,000 of the test images.
"""

RECIPE = "configs/vir_cifar10.py:model=vir_pico1,epochs=1"
SEEDS = (0, 1, 2)
COMMON = {
    "batch_size": 32,
    "accumulation_steps": 4,
    "ema_decay": 0.99,
    "optim.lr": 1e-3,
    "optim.warmup_epochs": 0.1,
    "log_every": 10,
    "model.position": "learned",
    "eval_every": 391,
    "data.eval_split": "test[:2000]",
}
ROWS = {
    "vir": {},
    "vit": {
        "model.name": "vit_pico1",
        "model.layer_scale": None,
        "epochs": 0.24,
        "optim.warmup_epochs": 0.024,
        "eval_every": 94,
    },
}
