"""What a ViT's weights are worth to a ViR, with and without alignment: `python -m benchmarks.alignment`.

A ViT is trained; a ViR of the same size then gets as much time in every arm:

- scratch: trained from fresh parameters;
- taken over: trained from the ViT's weights as they are;
- aligned: a share of the time goes into the alignment (`vir_jax.weights.align`), the rest into training from there.

The ViT's own time is counted out of these, as with a ViT that is there anyway. "scratch, longer" counts it in: its
time is that of the ViT and of an arm together. Time is a number of steps: what a step of each kind takes is measured
once, in turns, on the machine that begins, and kept in the folder. Everything sees the same labels and images: all of
them, or a part drawn by the seed. A ViR from scratch has the recipe's LayerScale; one with a ViT's weights has none, as
the ViT.

    python -m benchmarks.alignment --data=cifar10 --minutes=4          # 3 seeds, 100 and 10 % of the labels: 30 runs
    python -m benchmarks.alignment --data=cifar10 --seeds 0 --labels 10
    python -m benchmarks.alignment --data=digits --minutes=0.1 --seeds 0

What is finished is not run again, what was interrupted goes on. Writes benchmarks/results/alignment_DATA.{md,json} and,
of CIFAR-10, the table in docs/results.md, after every run, of all that the folder holds.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.data import AugmentConfig, Source, TrainLoader, open_source, train_loader
from vir_jax.data.classes import SelectedSource
from vir_jax.parallel.mesh import make_mesh, put_batch
from vir_jax.runs.checkpoint_reader import has_checkpoints
from vir_jax.runs.load import load_run
from vir_jax.runs.model import image_size, model_functions
from vir_jax.runs.recipes import load_recipe
from vir_jax.runs.storage import open_workdir
from vir_jax.tasks import make_task
from vir_jax.training.loop import train
from vir_jax.training.plan import make_plan
from vir_jax.weights import Card, PretrainedModel, save_run
from vir_jax.weights.align import align, to_vir
from vir_jax.weights.exchange import of_run

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
RECIPES = {"cifar10": "vir_cifar10", "digits": "vir_digits"}
SCRATCH, LONGER, TAKEN, ALIGNED, VIT = "scratch", "scratch, longer", "taken over", "aligned", "the ViT"
ARMS = (SCRATCH, TAKEN, ALIGNED, LONGER)
TIMED_STEPS, ROUNDS = 20, 3
RESULT = "result.json"


@dataclasses.dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        arm: of `ARMS`, or the ViT.
        labels: per cent that it saw.
        seed: of everything.
        steps: of training.
        alignment_steps: before them.
        top1: at the end, of the moving average.
    """

    arm: str
    labels: int
    seed: int
    steps: int
    alignment_steps: int
    top1: float


@dataclasses.dataclass(frozen=True)
class Budget:
    """Steps of each kind in an arm's time, and in the ViT's."""

    scratch: int
    longer: int
    alignment: int
    aligned: int
    vit: int


def part_of(source: Source, percent: int, seed: int) -> Source:
    """Return a part of a source, drawn by a seed."""
    count = len(source) * percent // 100
    return SelectedSource(source, np.random.default_rng(seed).permutation(len(source))[:count])


def configure(given: argparse.Namespace, family: str, *, steps: int, examples: int, seed: int) -> Any:
    """Return the recipe of a ViR or ViT, for so many steps; warm-up is as long a part of them as in the recipe."""
    config = load_recipe(RECIPES[given.data])
    config.seed = seed
    if family == "vit":
        config.model.layer_scale = None
    config.model.name = config.model.name.replace("vir_", f"{family}_")
    config.batch_size = min(config.batch_size, examples)
    warmup = config.optim.warmup_epochs / config.epochs
    config.epochs = steps * config.batch_size / examples
    config.optim.warmup_epochs = warmup * config.epochs
    config.eval_every, config.checkpoint_every, config.log_every = 0, 500, 200
    if given.data_dir is not None:
        config.data.data_dir = given.data_dir
    if given.lr is not None and family == "vir":
        config.optim.lr = given.lr
    return config


def batches_of(config: ml_collections.ConfigDict, source: Source) -> TrainLoader:
    """Return the training batches of a config."""
    data = config.data
    return train_loader(
        source,
        batch_size=config.batch_size,
        image_size=image_size(config.model),
        augment=AugmentConfig(**config.augment, mean=data.mean, std=data.std),
        seed=config.seed,
        num_threads=data.threads,
    )


# ---------------------------------------------------------------- what a step takes


def measure(given: argparse.Namespace, source: Source, folder: Path) -> dict[str, float]:
    """Return milliseconds of a training step of ViT and ViR and of one of alignment, with their data; once a folder."""
    file = folder / "step_ms.json"
    if file.exists():
        return json.loads(file.read_text())
    vit, vir = (configure(given, f, steps=1000, examples=len(source), seed=0) for f in ("vit", "vir"))
    kinds = {
        "vit": training_timer(vit, source),
        "vir": training_timer(vir, source),
        "align": functools.partial(time_alignment, vit, source),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _, (kind, run) in itertools.product(range(ROUNDS), kinds.items()):
        times[kind].append(run())
    found = {kind: 1e3 * min(each) for kind, each in times.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1) + "\n")
    return found


def training_timer(config: ml_collections.ConfigDict, source: Source) -> Any:
    """Return what gives the seconds of a step; it compiles once."""
    mesh = make_mesh(**config.mesh)
    plan = make_plan(config, mesh, task=make_task(config, source.class_names), steps_per_epoch=100)
    compiled = plan.compile()
    state = [plan.init(jax.random.key(0))]

    def seconds() -> float:
        with contextlib.closing(batches_of(config, source)) as batches, jax.set_mesh(mesh):
            for step in range(TIMED_STEPS + 1):
                if step == 1:
                    jax.block_until_ready(state[0])
                    start = time.perf_counter()
                state[0], _ = compiled(state[0], put_batch(next(batches), mesh, config.batch_size))
            jax.block_until_ready(state[0])
        return (time.perf_counter() - start) / TIMED_STEPS

    return seconds


def time_alignment(config: ml_collections.ConfigDict, source: Source) -> float:
    """Return the seconds of a step of alignment. It waits for its first step and for its last."""
    vit = fresh_vit(config, source)
    began: list[float] = []

    def clocked(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            began.append(time.perf_counter())
            yield batch

    with contextlib.closing(batches_of(config, source)) as batches:
        align(vit, to_vir(vit), clocked(batches), steps=TIMED_STEPS + 1)
    return (time.perf_counter() - began[1]) / TIMED_STEPS


def fresh_vit(config: ml_collections.ConfigDict, source: Source) -> PretrainedModel:
    """Return a ViT of a config with fresh weights."""
    functions = model_functions(config.model, source.num_classes)
    params = jax.jit(functions.init)(jax.random.key(0))
    options = {**functions.abstract.options, "image_size": config.model.image_size, "layer_scale": None}
    card = Card(
        model=options,
        num_classes=source.num_classes,
        class_names=tuple(source.class_names),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
    )
    return PretrainedModel(card, functions, params)


def budget_of(given: argparse.Namespace, step_ms: dict[str, float]) -> Budget:
    """Return how many steps the time is."""
    arm, vit = 6e4 * given.minutes, 6e4 * (given.pretraining_minutes or given.minutes)
    return Budget(
        scratch=max(round(arm / step_ms["vir"]), 1),
        longer=max(round((arm + vit) / step_ms["vir"]), 1),
        alignment=max(round(given.share * arm / step_ms["align"]), 1),
        aligned=max(round((1 - given.share) * arm / step_ms["vir"]), 1),
        vit=max(round(vit / step_ms["vit"]), 1),
    )


# ---------------------------------------------------------------- runs


def run_arm(
    given: argparse.Namespace, arm: str, budget: Budget, source: Source, folder: Path, record: dict[str, Any]
) -> Record:
    """Train one model, from what it starts from, or go on with it."""
    workdir = folder / arm.replace(" ", "_").replace(",", "")
    if (workdir / RESULT).exists():
        return Record(**json.loads((workdir / RESULT).read_text()))
    steps = {VIT: budget.vit, LONGER: budget.longer, ALIGNED: budget.aligned}.get(arm, budget.scratch)
    config = configure(
        given, "vit" if arm == VIT else "vir", steps=steps, examples=len(source), seed=record["seed"]
    )
    alignment = budget.alignment if arm == ALIGNED else 0
    if arm in (TAKEN, ALIGNED):
        config.model.layer_scale = None
        config.init_from = str(start_of(folder, alignment, config, source))
    top1 = train(config, workdir, train_source=source)["top1"]
    found = Record(arm=arm, steps=steps, alignment_steps=alignment, top1=top1, **record)
    (workdir / RESULT).write_text(json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def start_of(folder: Path, steps: int, config: ml_collections.ConfigDict, source: Source) -> Path:
    """Return the run of a ViR with the ViT's weights, aligned in so many steps; made where it is not there."""
    workdir = folder / f"start_{steps}"
    if not has_checkpoints(open_workdir(workdir)):
        vit = of_run(load_run(folder / VIT.replace(" ", "_"), "last"))
        vir = to_vir(vit)
        if steps:
            with contextlib.closing(batches_of(config, source)) as batches:
                vir = align(vit, vir, batches, steps=steps)
        save_run(workdir, vir)
    return workdir


# ---------------------------------------------------------------- report


def markdown(given: argparse.Namespace, records: Sequence[Record], step_ms: dict[str, float]) -> str:
    """Return a table of the arms: mean and standard deviation of the top-1 over the seeds."""
    labels = sorted({record.labels for record in records}, reverse=True)
    rows = []
    for arm in (VIT, *ARMS):
        own = [record for record in records if record.arm == arm]
        if own:
            steps = own[0].steps, own[0].alignment_steps
            written = f"{steps[1]:,} + {steps[0]:,}" if steps[1] else f"{steps[0]:,}"
            rows.append(
                [arm, written, *(_score([r.top1 for r in own if r.labels == percent]) for percent in labels)]
            )
    header = ["", "steps", *(f"top-1 with {percent} % of the labels" for percent in labels)]
    times = ", ".join(f"{kind} {value:.1f}" for kind, value in step_ms.items())
    pretraining = given.pretraining_minutes or given.minutes
    return (
        f"Top-1 on {given.data}, %, mean and standard deviation over seeds (their number). An arm has {given.minutes:g}"
        f" minutes of one machine's steps (ms a step: {times}), the alignment {given.share:.0%} of them; the ViT"
        f" had {pretraining:g} minutes, counted in for '{LONGER}' alone. Written by"
        " `python -m benchmarks.alignment`.\n\n" + markdown_table(header, rows)
    )


def _score(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread} ({len(values)})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not finished, report after each run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.alignment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=RECIPES, default="cifar10")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each arm")
    parser.add_argument("--pretraining_minutes", type=float, help="of the ViT; default: as of an arm")
    parser.add_argument("--share", type=float, default=0.25, help="of an arm's time that is alignment")
    parser.add_argument("--lr", type=float, help="of the ViR; default: the recipe's")
    parser.add_argument("--labels", nargs="+", type=int, default=[100, 10], help="per cent")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--folder", type=Path, default=Path("runs/alignment"), help="of all workdirs")
    parser.add_argument("--data_dir", help="where the data lie; default: as the recipe says")
    parser.add_argument("--report", action="store_true", help="run nothing, write the results again")
    given = parser.parse_args(arguments)
    if not 0 < given.share < 1 or given.minutes <= 0:
        parser.error("--share is a part of 1, and --minutes are more than 0")
    folder = given.folder / f"{given.data}_{given.minutes:g}min"
    if not given.report:
        data = load_recipe(RECIPES[given.data]).data
        whole = open_source(data.dataset, data.train_split, data_dir=given.data_dir)
        step_ms = measure(given, whole, folder)
        budget = budget_of(given, step_ms)
        for seed, percent in itertools.product(given.seeds, given.labels):
            source = whole if percent == 100 else part_of(whole, percent, seed)
            for arm in (VIT, *given.arms):
                below = folder / f"labels_{percent}" / f"seed_{seed}"
                found = run_arm(given, arm, budget, source, below, {"labels": percent, "seed": seed})
                print(f"{percent} % of the labels, seed {seed}, {arm}: {found.top1:.2%}", flush=True)
                report(given, folder)
    print(report(given, folder))


def report(given: argparse.Namespace, folder: Path) -> str:
    """Write table and records of all that the folder holds."""
    files = sorted(folder.glob(f"labels_*/seed_*/*/{RESULT}"))
    records = [Record(**json.loads(file.read_text())) for file in files]
    text = markdown(given, records, json.loads((folder / "step_ms.json").read_text()))
    write_results(f"alignment_{given.data}", f"# From ViT to ViR: {given.data}\n\n{text}", records)
    if given.data == "cifar10":
        PAGE.write_text(replace_between_markers(PAGE.read_text(), "alignment", text))
    return text


if __name__ == "__main__":
    main()
