"""The whole training step of ViR, of ViT beside it, and of timm's ViT where torch and timm are installed.

    python -m benchmarks.train_step                       # an accelerator; --models, --sizes and --batch_size choose
    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m benchmarks.train_step --plain --dtypes float32 bfloat16 \\
        --models vir_s16 vit_s16 'timm vit_small_patch16' --sizes 224 --batch_size 8  # a CPU, some three minutes

The recipe of configs/vir_b.py on one device: mixup, cutmix and normalisation of uint8 images that lie on the device
already, forward and backward pass, clipping, LAMB, moving average. timm's step has no mixup and no moving average, and
fused AdamW; with --plain, ours is like it. ViR in the mode that "auto" chooses, in the parallel mode, and by the kernel
for the device. The steps of one size and dtype take turns. Writes benchmarks/results/train_step.{md,json}, on a CPU
train_step_cpu.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.timing import failure, machine, markdown_table, write_results
from configs.imagenet import imagenet_config
from vir_jax.ops.kernels import PLATFORMS
from vir_jax.parallel.hardware import CHIPS
from vir_jax.parallel.memory import compiled_memory
from vir_jax.parallel.mesh import make_mesh
from vir_jax.runs.model import model_functions
from vir_jax.tasks import make_task
from vir_jax.training.compile_report import IMAGENET_EXAMPLES
from vir_jax.training.plan import make_plan

TIMM = {"timm vit_small_patch16": "vit_s16", "timm vit_base_patch16": "vit_b16"}
"""timm's models, and ours that are as large."""
MODELS = ("vir_s16", "vir_b16", "vit_s16", "vit_b16", *TIMM)
PARALLEL_UP_TO = 512  # pixels; the scores of larger images do not fit beside everything else
BATCH_SIZES = {224: 256, 512: 64, 1024: 16}  # About as many tokens each.
DTYPES = ("float32", "bfloat16")
ROUNDS, SECONDS_A_ROUND = 7, 1.0
Run = Callable[[int], None]
"""Does so many steps, and waits for the last."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One model at one size; seconds of a step, None where it failed."""

    model: str
    dtype: str
    form: str  # mode or kernel of retention
    size: int
    batch_size: int
    seconds: float | None
    flops: float  # of the model, forward and backward, in a step
    memory: int | None  # bytes that the step asks for
    failure: str

    def row(self, peak: float | None) -> list[str]:
        """Of the table."""
        row = [self.model, self.dtype, self.form, f"{self.size} px", str(self.batch_size)]
        if self.seconds is None:
            return [*row, self.failure, "", "", ""]
        utilisation = "" if peak is None else f"{100 * self.flops / self.seconds / peak:.0f} %"
        memory = "" if self.memory is None else f"{self.memory / 2**30:.1f}"
        speed = f"{self.batch_size / self.seconds:,.1f}"
        return [*row, speed, f"{1e3 * self.seconds:.1f}", utilisation, memory]


def forms(name: str, size: int) -> list[str]:
    """Of retention, on this platform."""
    if not name.startswith("vir"):
        return [""]
    kernels = [kernel for kernel, platform in PLATFORMS.items() if platform == jax.default_backend()]
    return ["auto", *(["parallel"] if size <= PARALLEL_UP_TO else []), *kernels]


def our_step(name: str, form: str, size: int, batch_size: int, *, dtype: str, plain: bool) -> tuple[Run, int]:
    """The step, compiled, and the bytes that it asks for."""
    config = imagenet_config()
    config.model.name, config.model.image_size, config.batch_size = name, (size, size), batch_size
    config.model.layer_scale, config.model.drop_path_rate = 1e-5 if name.startswith("vir") else None, 0.2
    config.model.dtype = dtype
    if plain:
        config.optim.name, config.ema_decay = "adamw", 0.0
        config.mixing.mixup_alpha = config.mixing.cutmix_alpha = 0.0
    if form in PLATFORMS:
        config.model.implementation = form
    elif form:
        config.model.mode = form
    mesh = make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    task = make_task(config, [str(number) for number in range(1000)])
    plan = make_plan(config, mesh, task=task, steps_per_epoch=IMAGENET_EXAMPLES / batch_size)
    step = plan.compile()
    state = plan.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (batch_size, size, size, 3), np.uint8),
        "label": rng.integers(0, 1000, batch_size, np.int32),
    }
    batch = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, plan.batch)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return run, compiled_memory(step)["total"]


def timm_step(name: str, size: int, batch_size: int, *, dtype: str) -> tuple[Run, None]:
    """timm's ViT with torch.compile; in bfloat16 by autocast."""
    import timm
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    architecture = f"{name.removeprefix('timm ')}_224"
    model = timm.create_model(architecture, img_size=size, drop_path_rate=0.2).to(device)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images = torch.randn(batch_size, 3, size, size, device=device)
    targets = torch.softmax(torch.randn(batch_size, 1000, device=device), dim=-1)

    def run(steps: int) -> None:
        for _ in range(steps):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(compiled(images), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()

    return run, None


def measure(models: list[str], size: int, batch_size: int, *, dtype: str, plain: bool) -> list[Record]:
    """All models at one size; their rounds take turns."""
    runs: dict[tuple[str, str], Run] = {}
    memory: dict[tuple[str, str], int | None] = {}
    failures: dict[tuple[str, str], str] = {}
    wanted = [(name, form) for name in models for form in forms(name, size)]
    for each in wanted:
        try:
            runs[each], memory[each] = (
                timm_step(each[0], size, batch_size, dtype=dtype)
                if each[0] in TIMM
                else our_step(*each, size, batch_size, dtype=dtype, plain=plain)
            )
            runs[each](2)
        except Exception as error:
            runs.pop(each, None)
            failures[each] = failure(error)
    times: dict[tuple[str, str], list[float]] = {each: [] for each in runs}
    steps = dict.fromkeys(runs, 1)
    for _ in range(ROUNDS):
        for each, run in runs.items():
            run(1)  # The one before leaves its own in the caches, and torch threads that spin for a while.
            start = time.perf_counter()
            run(steps[each])
            times[each].append((time.perf_counter() - start) / steps[each])
            steps[each] = max(1, round(SECONDS_A_ROUND / times[each][-1]))
    return [
        Record(
            model=name,
            dtype=dtype,
            form=form,
            size=size,
            batch_size=batch_size,
            seconds=statistics.median(times[name, form][1:]) if (name, form) in runs else None,
            flops=3 * batch_size * forward_flops(TIMM.get(name, name), size),
            memory=memory.get((name, form)),
            failure=failures.get((name, form), ""),
        )
        for name, form in wanted
    ]


def forward_flops(name: str, size: int) -> float:
    """Of a model, for one image."""
    flops = model_functions({"name": name, "image_size": size}, 1000).flops((size, size))
    assert flops is not None  # of these models all are counted
    return flops


def table(records: list[Record], peak: float | None) -> str:
    """Of what was measured on a chip of so many operations a second, if that is known."""
    header = ["training step", "dtype", "retention", "size", "batch", "images/s", "ms", "utilisation", "GiB"]
    return markdown_table(header, [record.row(peak) for record in records])


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(BATCH_SIZES), help="pixels of a side")
    parser.add_argument("--batch_size", type=int, help="of every size; default: as many tokens each")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="of the products")
    parser.add_argument("--plain", action="store_true", help="AdamW, no mixup, no moving average: as timm's")
    arguments = parser.parse_args()
    models = list(arguments.models)
    if not all(importlib.util.find_spec(module) for module in ("torch", "timm")):
        models = [model for model in models if model not in TIMM]
        print("torch and timm are not installed: without timm's ViT")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside JAX.
    chip = CHIPS.get(jax.devices()[0].device_kind)
    peak = None if chip is None else chip.peak_flops
    records: list[Record] = []
    for size, dtype in itertools.product(arguments.sizes, arguments.dtypes):
        batch_size = arguments.batch_size or BATCH_SIZES.get(size, 16)
        records += measure(models, size, batch_size, dtype=dtype, plain=arguments.plain)
        where = ", ".join(f"{key} {value}" for key, value in machine().items())
        what = "AdamW, no mixup, no moving average" if arguments.plain else "the recipe's step"
        page = f"# Training step\n\n{where}; {what}\n\n{table(records, peak)}"
        print(page, flush=True)
        write_results("train_step_cpu" if jax.default_backend() == "cpu" else "train_step", page, records)


if __name__ == "__main__":
    main()
