"""What a compiler says that each form of retention costs on an accelerator: `python -m benchmarks.estimates`.

Forward, and value and gradient, of 12 heads of 64 in bfloat16, compiled for a chip that need not be there: operations
and bytes as its compiler counts them, over what the chip's maker says that it does in a second. The larger of the two
quotients is the time that the program cannot undercut, if the counts are right. It is an estimate, no measurement: it
knows nothing of latency, of a loop's overhead, of how well a product fills the matrix unit. `mode="auto"` and its chunk
sizes are chosen by it where nothing has been measured (`vir_jax.ops.sequence`).

A compiler counts the body of a loop once, whatever its trips. So chunkwise programs are compiled with their loop
unrolled, for two short sequences, and their counts continued in a straight line: they are linear in the tokens.

    python -m benchmarks.estimates                  # v5e and v6e; needs libtpu: pip install "vir-jax[compile]"
    python -m benchmarks.estimates --chips h100     # needs JAX's plug-in for CUDA: requirements-compile-gpu.txt

Half an hour of a CPU core for each chip. Adds to benchmarks/results/estimates.{md,json}.
"""

import argparse
import dataclasses
import functools
import json
import unittest.mock
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks.timing import RESULTS, markdown_table, write_results
from vir_jax.ops import retention, vir_log_decay
from vir_jax.parallel.hardware import CHIPS

HEADS, WIDTH, TOKENS_AT_ONCE = 12, 64, 8 * 1025  # The batch is so large that all sizes have about as many tokens.
LENGTHS = (197, 577, 1025, 4097)
CHUNKS = (64, 128, 256)
PASSES = ("forward", "value and gradient")
TARGETS = Path(__file__).parents[1] / "tests" / "ops"
TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "h100": "h100.textproto"}


@dataclasses.dataclass(frozen=True)
class Record:
    """What a program costs.

    Attributes:
        chip: that it is compiled for.
        which: of `PASSES`.
        tokens: of an image.
        form: "parallel", or "chunks of C".
        operations: of an image.
        bytes: that move between the chip's memory and its cores, of an image.
        microseconds: of an image, at least.
    """

    chip: str
    which: str
    tokens: int
    form: str
    operations: float
    bytes: float
    microseconds: float


def device_of(chip: str) -> Any:
    """Return a device that need not be there."""
    if chip == "h100":
        return topologies.get_topology_desc(
            platform="cuda", target_config=(TARGETS / TOPOLOGIES[chip]).read_text(), topology="1x1x1"
        ).devices[0]
    return topologies.get_topology_desc(TOPOLOGIES[chip], platform="tpu").devices[0]


def counts(device: Any, which: str, tokens: int, mode: str, chunk: int | None) -> tuple[float, float]:
    """Return operations and bytes of an image, as the compiler counts them, of a program without loops."""
    batch = max(TOKENS_AT_ONCE // tokens, 1)
    mesh = jax.make_mesh((1,), ("device",), axis_types=(jax.sharding.AxisType.Auto,), devices=[device])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    x = jax.ShapeDtypeStruct((batch, tokens, HEADS, WIDTH), jnp.bfloat16, sharding=sharding)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return retention(q, k, v, vir_log_decay(HEADS), mode=mode, chunk_size=chunk)[0]

    def gradient(q: jax.Array, k: jax.Array, v: jax.Array, cotangent: jax.Array) -> Any:
        out, pull_back = jax.vjp(forward, q, k, v)
        return out, pull_back(cotangent)

    function: Callable[..., Any] = forward if which == PASSES[0] else gradient
    arguments = (x, x, x) if which == PASSES[0] else (x, x, x, x)
    unrolled = functools.partial(jax.lax.scan, unroll=True)
    jax.clear_caches()  # `retention` is jitted: a trace of it with a loop must not be taken for one without.
    with jax.set_mesh(mesh), unittest.mock.patch("jax.lax.scan", unrolled):
        compiled = jax.jit(function).lower(*arguments).compile()
    cost = compiled.cost_analysis()
    return cost["flops"] / batch, cost["bytes accessed"] / batch


def estimate(chip: str, which: str) -> list[Record]:
    """Count every form at every length on a chip."""
    device = device_of(chip)
    maker = CHIPS[device.device_kind]

    def record(tokens: int, form: str, operations: float, moved: float) -> Record:
        seconds = max(operations / maker.peak_flops, moved / maker.bandwidth)
        return Record(chip, which, tokens, form, operations, moved, 1e6 * seconds)

    records = []
    for tokens in LENGTHS:
        records.append(record(tokens, "parallel", *counts(device, which, tokens, "parallel", None)))
    for chunk in CHUNKS:
        short, long = (chunks * chunk + 1 for chunks in (2, 4))
        at_short, at_long = (counts(device, which, n, "chunkwise", chunk) for n in (short, long))
        for tokens in LENGTHS:
            far = (tokens - short) / (long - short)
            operations, moved = (a + far * (b - a) for a, b in zip(at_short, at_long, strict=True))
            records.append(record(tokens, f"chunks of {chunk}", operations, moved))
    return records


def page(records: Sequence[Record]) -> str:
    """Return a table for each chip and pass."""
    parts = [
        "# Retention on accelerators: estimates, microseconds an image\n",
        f"`python -m benchmarks.estimates`; {HEADS} heads of {WIDTH}, bfloat16. The larger of operations over the chip's"
        " peak and bytes over its\nbandwidth, as its compiler counts them; nothing was measured. In parentheses MB that"
        " move; q, k, v and the output alone are 0.006 MB a token.\n",
    ]
    found = {(r.chip, r.which, r.form, r.tokens): r for r in records}
    forms = list(dict.fromkeys(r.form for r in records))
    for chip in dict.fromkeys(r.chip for r in records):
        for which in PASSES:
            rows = []
            for form in forms:
                cells = [found[chip, which, form, n] for n in LENGTHS]
                rows.append([form, *(f"{r.microseconds:.1f} ({r.bytes / 1e6:.1f})" for r in cells)])
            parts.append(markdown_table([f"{chip}, {which}", *(f"{n:,} tokens" for n in LENGTHS)], rows))
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, print and write; what the results have of other chips stays."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimates", description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=TOPOLOGIES, default=["v5e", "v6e"])
    given = parser.parse_args(arguments)
    stored = RESULTS / "estimates.json"
    records = [Record(**r) for r in json.loads(stored.read_text())["records"]] if stored.exists() else []
    for chip in given.chips:
        new = [record for which in PASSES for record in estimate(chip, which)]
        records = [record for record in records if record.chip != chip] + new
        write_results("estimates", page(records), records)
    print(page(records))


if __name__ == "__main__":
    main()
