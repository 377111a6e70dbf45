"""What training steps need on TPU slices, compiled for them without owning one: the table of docs/scaling.md.

    pip install -r requirements-compile.txt
    python -m benchmarks.scaling

Memory and communication are the compiler's; nothing is run.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import jax
import ml_collections

from benchmarks.timing import markdown_table, replace_between_markers, write_results
from vir_jax.parallel.collectives import Traffic
from vir_jax.parallel.hardware import GIB
from vir_jax.training.compile_report import compile_report

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:4x4x4", "v6e:16x16")
RECIPES = ("vir_b", "vir_l")
# Image side, and the batch: the recipes' own at 224 px, and 8 images a chip at 1024 px.
SIZES = (224, 1024)
IMAGES_PER_CHIP = {1024: 8}


@dataclasses.dataclass(frozen=True)
class Record:
    """One compiled step, per chip: bytes; capacity is the chip's."""

    recipe: str
    topology: str
    size: int
    batch_size: int
    mesh: dict[str, int]
    remat: bool
    state: int
    memory: int | None  # None: the compiler gave up.
    capacity: int
    fits: bool
    model_flops: float
    collectives: dict[str, Traffic]


def recipe(name: str, size: int, chips: int, *, remat: bool) -> ml_collections.ConfigDict:
    """The recipe at another image size; `remat`: recomputing all of its blocks even if it does without."""
    config = import_module(f"configs.{name}").get_config()
    config.model.image_size = (size, size)
    if remat:
        config.model.remat = "full"
    if size in IMAGES_PER_CHIP:
        config.batch_size = IMAGES_PER_CHIP[size] * chips
        config.model.remat = "full"
    return config


def measure(name: str, topology: str, size: int, *, remat: bool = False) -> Record:
    """Compiles one step."""
    chips = math.prod(map(int, topology.partition(":")[2].split("x")))
    config = recipe(name, size, chips, remat=remat)
    report = compile_report(config, topology)
    return Record(
        recipe=name,
        topology=topology,
        size=size,
        batch_size=config.batch_size,
        mesh=report.mesh,
        remat=config.model.remat == "full",
        state=report.state,
        memory=report.memory.get("total"),
        capacity=report.capacity,
        fits=report.fits,
        model_flops=report.model_flops,
        collectives=report.collectives,
    )


def measure_all() -> Iterator[Record]:
    """Each recipe on each slice; what does not fit, again with all of its blocks recomputed."""
    for size, name, topology in itertools.product(SIZES, RECIPES, TOPOLOGIES):
        record = measure(name, topology, size)
        yield record
        if not (record.fits or record.remat):
            yield measure(name, topology, size, remat=True)


def table(records: list[Record]) -> str:
    """One line a step."""
    header = ["recipe, px", "slice", "data x fsdp", "batch", "per chip", "state", "memory", "of", "TFLOP"]
    header += ["gather", "reduce", "other"]
    rows = []
    for r in records:
        chips = math.prod(r.mesh.values())
        kinds = ("all-gather", ("all-reduce", "reduce-scatter"))
        sent = {kind: traffic.bytes for kind, traffic in r.collectives.items()}
        gather = sent.pop(kinds[0], 0)
        reduce = sum(sent.pop(kind, 0) for kind in kinds[1])
        rows.append(
            [
                f"`{r.recipe}`, {r.size}{', remat' if r.remat else ''}",
                r.topology,
                f"{r.mesh['data']} x {r.mesh['fsdp']}",
                f"{r.batch_size:,}",
                str(r.batch_size // chips),
                f"{r.state / GIB:.2f}",
                "does not fit" if r.memory is None else f"{r.memory / GIB:.2f}",
                f"{r.capacity / GIB:.0f}",
                f"{r.model_flops / 1e12:.1f}",
                *(f"{size / 2**20:,.0f}" for size in (gather, reduce, sum(sent.values()))),
            ]
        )
    return markdown_table(header, rows)


def main() -> None:
    """Compiles, prints and writes."""
    jax.config.update("jax_platforms", "cpu")
    records: list[Record] = []
    for record in measure_all():
        records.append(record)
        print(table(records[-1:]).splitlines()[-1], flush=True)
        # Minutes each: what is done is kept.
        write_results("scaling", table(records), records)
        PAGE.write_text(replace_between_markers(PAGE.read_text(), "scaling", table(records)))


if __name__ == "__main__":
    main()
