"""Kernels against XLA's forms, softmax attention by cuDNN, and flash-linear-attention, beside the byte floor.

    python -m benchmarks.kernels            # an accelerator; --widths, --lengths, --tokens and --passes choose

bfloat16, 768 / d heads of d. Forward, and forward with the gradients by q, k and v, at as many tokens a batch as
`--tokens` says and at batch 1. A program makes as many calls in a row as it takes to outlast its launch, each on arrays
of its own, and runs on several sets of them, many times before the device is waited for; the time is divided by the
number of calls. So caches do not hold the inputs, and the host's work is hidden behind the device's, but for the
shortest calls. Programs take turns; medians.
The floor is what a copy of the bytes that must move would take, at the bandwidth of a copy measured in the same
run. flash-linear-attention takes part where torch and fla are installed, with the same decays. Writes
benchmarks/results/kernels.{md,json}.
"""

import argparse
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import failure, machine, markdown_table, median_ms, write_results
from vir_jax.ops import retention, vir_log_decay
from vir_jax.ops.attention import attention
from vir_jax.ops.kernels import PLATFORMS

MODEL_WIDTH = 768
WIDTHS = (64, 128)
LENGTHS = (197, 577, 1025, 4097, 16384, 65536)
TOKENS = 65536
PASSES = ("forward", "forward and backward")
PARALLEL, ATTENTION, FLA = "xla, parallel", "cuDNN attention", "flash-linear-attention"
PARALLEL_UP_TO = 2048  # tokens; the scores of more do not fit beside everything else
CACHE_BYTES = 2**28  # at least what all inputs of a measurement come to
# About what the inputs of a program come to: with less it is over before the next one is launched.
PROGRAM_BYTES = 2**26
MAX_CALLS = 16  # of a program, as it is compiled call by call
WAIT_MS = 20.0  # The device is waited for about as often: a wait takes some tenths of a millisecond.
AGREEMENT = 1e-2  # relative RMS in bfloat16
ROUNDS = 9

Operator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Run = Callable[[int], Any]
"""Makes all calls so many times, and waits for the last."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One operator at one size in one pass; `ms` of a call is None where it failed."""

    width: int
    length: int
    batch: int
    which: str
    name: str
    ms: float | None
    floor_ms: float
    failure: str


def operators(width: int, length: int) -> dict[str, Operator]:
    """What JAX offers on this platform."""
    op = partial(_output, log_decay=vir_log_decay(MODEL_WIDTH // width))
    found: dict[str, Operator] = {
        name: partial(op, implementation=name)
        for name, platform in PLATFORMS.items()
        if platform == jax.default_backend()
    }
    by_xla = partial(op, implementation="xla")
    found["xla, chunkwise"] = partial(by_xla, mode="chunkwise")
    if length <= PARALLEL_UP_TO:
        found[PARALLEL] = partial(by_xla, mode="parallel")
    if jax.default_backend() == "gpu":
        found[ATTENTION] = attention
    return found


def _output(q: jax.Array, k: jax.Array, v: jax.Array, **options: Any) -> jax.Array:
    return retention(q, k, v, **options)[0]


Arrays = Sequence[tuple[jax.Array, ...]]
"""q, k, v and the output's cotangent of each call."""


def random_arrays(shape: tuple[int, ...], calls: int, sets: int) -> list[Arrays]:
    """Those of the calls of each set."""

    @jax.jit
    def arrays(key: jax.Array) -> Arrays:
        each = [jax.random.normal(key, (4, *shape), jnp.bfloat16) for key in jax.random.split(key, calls)]
        return [tuple(x) for x in each]

    return [arrays(key) for key in jax.random.split(jax.random.key(0), sets)]


def jax_run(operator: Operator, which: str, arrays: list[Arrays]) -> Run:
    """All calls of a set in one compiled program."""

    def call(q: jax.Array, k: jax.Array, v: jax.Array, d_out: jax.Array) -> Any:
        if which == PASSES[0]:
            return operator(q, k, v)
        out, pull_back = jax.vjp(operator, q, k, v)
        return out, pull_back(d_out)

    program = jax.jit(lambda arrays: [call(*each) for each in arrays]).lower(arrays[0]).compile()

    def run(times: int) -> None:
        for _ in range(times):
            for each in arrays:
                results = program(each)
        jax.block_until_ready(results)

    return run


def fla_run(which: str, arrays: list[Arrays]) -> Run:
    """flash-linear-attention's `chunk_simple_gla`, a decay for each head (written for fla 0.6); all in one CUDA graph.

    Raises:
        ValueError: what it computes is not what `retention` does.
    """
    import torch
    from fla.ops.simple_gla import chunk_simple_gla

    log_decay = vir_log_decay(arrays[0][0][0].shape[2])
    decays = torch.tensor(log_decay.tolist(), device="cuda")
    inputs = [
        [torch.from_dlpack(x).clone().requires_grad_(i < 3) for i, x in enumerate(call)]
        for each in arrays
        for call in each
    ]
    with torch.no_grad():
        theirs = jnp.from_dlpack(chunk_simple_gla(*inputs[0][:3], g_gamma=decays)[0].contiguous())
    ours, _ = retention(*arrays[0][0][:3], log_decay, mode="chunkwise", implementation="xla")
    error = jnp.linalg.norm((theirs - ours).astype(jnp.float32)) / jnp.linalg.norm(ours.astype(jnp.float32))
    if not error < AGREEMENT:
        raise ValueError(f"flash-linear-attention's output is off ours by a relative RMS of {error:.1e}")

    def calculate() -> None:
        for q, k, v, d_out in inputs:
            if which == PASSES[0]:
                with torch.no_grad():
                    chunk_simple_gla(q, k, v, g_gamma=decays)
            else:
                out, _ = chunk_simple_gla(q, k, v, g_gamma=decays)
                torch.autograd.grad(out, (q, k, v), d_out)

    # A first run lets Triton compile and tune; capture wants it on a stream beside the usual one.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calculate()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads go on.
        calculate()

    def run(times: int) -> None:
        for _ in range(times):
            graph.replay()
        torch.cuda.synchronize()

    return run


def bandwidth() -> float:
    """Bytes a second of a copy, read and written."""
    x = jnp.zeros(CACHE_BYTES, jnp.bfloat16)
    copy = jax.jit(lambda x: x + 1).lower(x).compile()
    return 2 * x.nbytes / (1e-3 * ms_of_each({"copy": lambda times: _repeat(copy, x, times)})["copy"])


def _repeat(program: Callable[[jax.Array], jax.Array], x: jax.Array, times: int) -> None:
    for _ in range(times):
        result = program(x)
    jax.block_until_ready(result)


def ms_of_each(runs: dict[str, Run]) -> dict[str, float]:
    """Medians of all calls of a run, once; they take turns."""
    once = median_ms({name: partial(run, 1) for name, run in runs.items()}, rounds=3)
    times = {name: max(1, round(WAIT_MS / ms)) for name, ms in once.items()}
    many = median_ms({name: partial(run, times[name]) for name, run in runs.items()}, rounds=ROUNDS)
    return {name: ms / times[name] for name, ms in many.items()}


def measure_size(width: int, length: int, batch: int, which: str, bytes_a_second: float) -> list[Record]:
    """All operators."""
    array = 2 * batch * length * MODEL_WIDTH  # bytes
    # q, k, v and o; backward q, k, v and do are read, dq, dk and dv written.
    floor = array * (4 if which == PASSES[0] else 11) / bytes_a_second
    calls = max(1, min(MAX_CALLS, PROGRAM_BYTES // (4 * array)))
    sets = math.ceil(CACHE_BYTES / (calls * 4 * array))
    arrays = random_arrays((batch, length, MODEL_WIDTH // width, width), calls, sets)
    names: dict[str, Callable[[], Run]] = {
        name: partial(jax_run, operator, which, arrays) for name, operator in operators(width, length).items()
    }
    if all(importlib.util.find_spec(module) for module in ("torch", "fla")):
        names[FLA] = partial(fla_run, which, arrays)
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    for name, prepare in names.items():
        try:
            run = prepare()
            run(1)
            runs[name] = run
        except Exception as error:
            failures[name] = failure(error)
    ms = ms_of_each(runs)
    return [
        Record(
            width,
            length,
            batch,
            which,
            name,
            ms[name] / (calls * sets) if name in runs else None,
            1e3 * floor,
            failures.get(name, ""),
        )
        for name in names
    ]


def table(records: list[Record], which: str) -> str:
    """Milliseconds of each operator at each size."""
    chosen = [record for record in records if record.which == which]
    names = list(dict.fromkeys(record.name for record in chosen))
    rows = []
    for size in dict.fromkeys((record.width, record.length, record.batch) for record in chosen):
        here = {x.name: x for x in chosen if (x.width, x.length, x.batch) == size}
        floor = next(iter(here.values())).floor_ms
        row = [f"d={size[0]}, N={size[1]}, b={size[2]}", f"{floor:.3f}"]
        for name in names:
            ms = here[name].ms if name in here else None
            if ms is None:
                row.append(here[name].failure if name in here else "")
            else:
                row.append(f"{ms:.3f} ({floor / ms:.0%})")
        rows.append(row)
    return markdown_table([f"{which}, ms (floor over time)", "floor", *names], rows)


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="of a head")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens of a sequence")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a batch")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES)
    arguments = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room beside JAX.
    bytes_a_second = bandwidth()
    records: list[Record] = []
    for width in arguments.widths:
        for length in arguments.lengths:
            for batch in dict.fromkeys((max(1, arguments.tokens // length), 1)):
                for which in arguments.passes:
                    records += measure_size(width, length, batch, which, bytes_a_second)
                    write(records, bytes_a_second)
                    print(f"{width} {length} {batch} {which}", *records[-1:], flush=True)
    print(write(records, bytes_a_second))


def write(records: list[Record], bytes_a_second: float) -> str:
    """The tables of what has been measured."""
    where = ", ".join(f"{key} {value}" for key, value in machine().items())
    parts = [
        "# Kernels\n",
        f"`python -m benchmarks.kernels`; bfloat16, {MODEL_WIDTH} / d heads of d; {where}; a copy moves "
        f"{bytes_a_second / 1e12:.2f} TB/s.\n",
        *(table(records, which) for which in dict.fromkeys(record.which for record in records)),
    ]
    markdown = "\n".join(parts)
    write_results("kernels", markdown, records)
    return markdown


if __name__ == "__main__":
    main()
