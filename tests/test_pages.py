"""The pages do what they say: their code runs, their commands have these flags, their figures are those measured."""

import dataclasses
import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    equivalence,
    generation,
    kernels,
    mixers,
    resolution,
    retention,
    scaling,
    segmentation,
    tpu_modes,
    train_step,
)
from benchmarks.ablation import report as ablation
from benchmarks.ablation.grid import load_grid
from benchmarks.ablation.report import read_records
from benchmarks.faults import __main__ as faults
from benchmarks.faults.bench import Record as Fault
from benchmarks.timing import Peaks
from vir_jax.parallel.collectives import Traffic
from vir_jax.parallel.hardware import CHIPS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
COMMANDS = {
    **{
        f"vir-{name}": f"vir_jax/commands/{name}.py"
        for name in ("train", "eval", "predict", "generate", "compile", "bench")
    },
    **{
        f"python {name}.py": f"vir_jax/commands/{name}.py"
        for name in ("train", "eval", "predict", "generate")
    },
    **{
        f"python -m vir_jax.{name}": f"vir_jax/{name}/__main__.py"
        for name in ("weights", "deploy", "probe", "inspection")
    },
    "python -m vir_jax.commands.compile": "vir_jax/commands/compile.py",
    "python -m vir_jax.data.prepare": "vir_jax/data/prepare.py",
}
# The pages' own names for what a user has: paths, and flags of every command.
SHARED = {"traceback", "coordinator_address", "num_processes", "process_id", "help"}


def blocks(text, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def python_of_pages():
    """The code of each page, without what another page has, too."""
    seen = set()
    for page in PAGES:
        fresh = [block for block in blocks(page.read_text(), "python") if block not in seen]
        seen.update(fresh)
        if fresh:
            yield pytest.param("\n".join(fresh), id=page.name)


@pytest.mark.parametrize("code", list(python_of_pages()))
def test_code_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


def lines():
    for page in PAGES:
        for block in blocks(page.read_text(), "sh", ""):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, line.partition("  #")[0].strip()


def flags_of(source):
    text = (ROOT / source).read_text()
    return SHARED | set(re.findall(r"(?:DEFINE_\w+|define_\w+|add_argument)\(\s*\"(?:--)?(\w+)\"", text))


def test_commands_have_these_flags():
    found = [(page, line) for page, line in lines() if re.match(r"vir-|python (?:-m vir_jax|\w+\.py)", line)]
    assert len(found) > 20
    for page, line in found:
        command = next(
            (command for command in sorted(COMMANDS, key=len, reverse=True) if line.startswith(command)), None
        )
        assert command is not None, (page, line)
        given = {name.partition(".")[0] for name in re.findall(r"\s--(?:no)?([\w.]+)", line)}
        assert given <= flags_of(COMMANDS[command]), (page, line)


def test_benchmarks_that_are_named_exist():
    named = {line.split()[2] for _, line in lines() if line.startswith("python -m benchmarks")}
    assert len(named) > 5
    for module in named:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


# --- Figures ---


def between_markers(page, name):
    text = (ROOT / page).read_text()
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    assert text.count(begin) == text.count(end) == 1
    return text.partition(begin)[2].partition(end)[0]


def records(name, kind, **nested):
    stored = json.loads((RESULTS / f"{name}.json").read_text())["records"]
    names = {field.name for field in dataclasses.fields(kind)}
    return [
        kind(**{key: nested.get(key, lambda x: x)(value) for key, value in record.items() if key in names})
        for record in stored
    ]


def rows(markdown):
    return [line for line in markdown.splitlines() if line.startswith("|")]


def test_tables_are_those_of_the_results():
    """Each is made again from the numbers as they were stored."""
    expected = {
        ("docs/modes.md", "equivalence"): equivalence._markdown(records("equivalence", equivalence.Record)),
        ("docs/speed.md", "resolution"): resolution.markdown(records("resolution", resolution.Point)),
        ("docs/faults.md", "faults"): faults.table(records("faults", Fault)),
        ("docs/scaling.md", "scaling"): scaling.table(
            records(
                "scaling",
                scaling.Record,
                collectives=lambda kinds: {
                    kind: Traffic(**{"dtypes": {}, **traffic}) for kind, traffic in kinds.items()
                },
            )
        ),
    }
    stored = json.loads((RESULTS / "mixers.json").read_text())["records"]
    timed, memory = ([r for r in stored if ("ms" in r) == is_timed] for is_timed in (True, False))
    expected["docs/speed.md", "mixers"] = mixers.page(
        [mixers.Record(**r) for r in timed], [mixers.Memory(**r) for r in memory]
    )
    of_operators = records("retention", retention.Record, peaks=lambda peaks: peaks and Peaks(**peaks))
    expected["docs/speed.md", "retention"] = retention.of_sequences(of_operators)
    expected["docs/generate.md", "generation"] = generation.report(records("generation", generation.Record))
    for name in (
        "cifar10",
        "cifar10_1024",
        "cifar10_half_hour",
        "cifar10_screen",
        "cifar10_pixels",
        "vix",
        "digits",
        "digits_pixels",
    ):
        grid = load_grid(ROOT / "benchmarks" / "grids" / f"{name}.py")
        found = read_records(RESULTS / f"ablation_{grid.name}.json")
        expected["docs/results.md", f"ablation_{grid.name}"] = ablation.markdown(grid, found)
    for name in ("pretraining", "alignment"):
        file = {"alignment": "alignment_cifar10"}.get(name, name)
        expected["docs/results.md", name] = (RESULTS / f"{file}.md").read_text()
    kernel_records = records("kernels", kernels.Record)
    expected["docs/speed.md", "kernels"] = "".join(
        kernels.table(kernel_records, each) for each in kernels.PASSES
    )
    expected["docs/dense.md", "segmentation"] = segmentation.markdown(
        records("segmentation", segmentation.Record)
    )
    expected["docs/speed.md", "train_step_cpu"] = train_step.table(
        records("train_step_cpu", train_step.Record), peak=None
    )
    expected["docs/speed.md", "train_step"] = train_step.table(
        records("train_step", train_step.Record), CHIPS["NVIDIA H100 80GB HBM3"].peak_flops
    )
    expected["docs/speed.md", "tpu_modes"] = tpu_modes.table(records("tpu_modes", tpu_modes.Record))
    for (page, name), markdown in expected.items():
        assert rows(between_markers(page, name)) == rows(markdown), page


def test_figures_of_the_readme_are_those_of_the_results():
    points = {(p.model, p.mode, p.size): p for p in records("resolution", resolution.Point)}
    text = " ".join((ROOT / "README.md").read_text().split())
    vit = {size: points["timm_vit_s16", resolution.TORCH, size] for size in (1024, 2048)}
    said = (
        f"takes {vit[1024].seconds:.2f} s at 1024 pixels, and {vit[2048].seconds:.0f} s and"
        f" {vit[2048].peak_bytes / 1e9:.2f} GB at 2048"
    )
    assert said in text
    vir = {size: points["vir_s16", resolution.STREAM, size] for size in (1024, 2048, 8192)}
    said = (
        f"takes {vir[1024].seconds:.2f} s at 1024, {vir[2048].seconds:.2f} s and {vir[2048].peak_bytes / 1e9:.2f} GB at"
        f" 2048, and {vir[8192].seconds:.0f} s and {vir[8192].peak_bytes / 1e9:.2f} GB at 8192"
    )
    assert said in text
    pipeline = json.loads((RESULTS / "input_pipeline.json").read_text())["medians"]
    speed = (ROOT / "docs/speed.md").read_text()
    said = re.findall(r"^\| (?:random resized crop|the full recipe).* \| (\d+) \|$", speed, re.MULTILINE)
    measured = [pipeline[name] for name in ("crop and flip, loader", "full recipe, loader")]
    assert [int(number) for number in said] == pytest.approx(measured, abs=0.5)


def test_what_the_pages_say_of_large_images_is_in_the_results():
    """docs/speed.md, README: seconds of one model over those of another."""
    seconds = {(p.model, p.mode, p.size): p.seconds for p in records("resolution", resolution.Point)}

    def times(model, mode, other_model, other_mode, *sizes):
        return [seconds[model, mode, size] / seconds[other_model, other_mode, size] for size in sizes]

    timm, up_to_2048 = ("timm_vit_s16", resolution.TORCH), resolution.SIZES[:4]
    vir = times("vir_s16", "chunkwise", *timm, 224, 1024, 2048)
    assert vir == pytest.approx([0.54, 1 / 5, 1 / 13], rel=0.05)
    vit = times("vit_s16", resolution.ATTENTION, *timm, *up_to_2048)
    assert (round(min(vit), 1), round(max(vit), 1)) == (0.7, 0.8)
    in_2d = times("vir_s16", resolution.STREAM_2D, "vir_s16", resolution.STREAM, *resolution.SIZES)
    assert (round(min(in_2d), 1), round(max(in_2d), 1), round(in_2d[-1], 2)) == (1.2, 1.5, 1.37)
    pair = ("timm_vit_s16", resolution.TORCH_EAGER_16, "vir_s16", resolution.CHUNKWISE_16)
    bfloat16 = times(*pair, *up_to_2048)
    assert bfloat16[0] < 1 < min(bfloat16[1:])
    assert round(bfloat16[-1]) == 22
    pyramid = times("vir_h_ti", "chunkwise", "vir_s16", "chunkwise", *up_to_2048)
    assert (round(min(pyramid), 1), round(max(pyramid), 1)) == (1.3, 1.5)


def test_what_the_pages_say_of_a_training_step_is_in_the_results():
    """README: 0.7 of timm's time in float32, four thirds on an H100; docs/speed.md: a third less in bfloat16."""
    steps = {(r.model, r.dtype, r.form): r.seconds for r in records("train_step_cpu", train_step.Record)}
    ours, theirs = steps["vir_s16", "float32", "auto"], steps["timm vit_small_patch16", "float32", ""]
    assert ours / theirs == pytest.approx(0.7, abs=0.02)
    assert steps["vir_s16", "bfloat16", "auto"] / ours == pytest.approx(2 / 3, abs=0.02)
    steps = {(r.model, r.form): r.seconds for r in records("train_step", train_step.Record)}
    ours, theirs = steps["vir_b16", "auto"], steps["timm vit_base_patch16", ""]
    assert ours / theirs == pytest.approx(4 / 3, abs=0.02)
    assert steps["vir_b16", "parallel"] / ours == pytest.approx(1.4, abs=0.05)


def test_what_the_pages_say_of_the_kernel_for_cpus_is_in_the_results():
    """README: 1.7 to 2.9 times as fast; docs/speed.md besides: shares of the floor, torch's chunks, and 2-D."""
    found = records("retention", retention.Record, peaks=lambda peaks: peaks and Peaks(**peaks))

    def ratios(op, sizes, of):
        """The milliseconds `of` a record of "auto", or of another, over the kernel's."""
        by_mode = {(r.mode, r.size, r.which): r for r in found if r.op == op}
        keys = [(size, which) for size in sizes for which in retention.PASSES]
        each = [of(by_mode, *key) / by_mode["cpp_cpu", *key].ms for key in keys]
        return min(each), max(each)

    long = [f"N={n} (b={b})" for n, b in retention.SEQUENCES if n >= 577]
    auto = ratios("retention", long, lambda by, *key: by["auto", *key].ms)
    assert auto == pytest.approx((1.7, 2.9), abs=0.05)
    assert ratios("retention", long, lambda by, *key: by["torch, chunks of 64", *key].ms)[0] > 3
    floor = ratios("retention", long, lambda by, *key: by["auto", *key].floor_ms)
    assert floor == pytest.approx((0.36, 0.49), abs=0.005)
    large = [f"{rows}x{cols} + 1 (b={b})" for (rows, cols), b in retention.GRIDS if rows >= 24]
    in_2d = ratios("retention_2d", large, lambda by, *key: by["auto", *key].ms)
    assert in_2d == pytest.approx((1.6, 3.1), abs=0.05)


def test_what_the_pages_say_of_the_kernel_is_in_the_results():
    """docs/speed.md: beside flash-linear-attention and cuDNN's attention on an H100."""
    ms = {(r.which, r.name, r.length): r.ms for r in records("kernels", kernels.Record)}
    ours = {(which, length): ms[which, "mosaic_gpu", length] for which, _, length in ms}
    forward, both = kernels.PASSES
    fla = {each: ms[each[0], kernels.FLA, each[1]] / ours[each] for each in ours}
    assert fla.pop((forward, 16384)) < 1
    assert all(1 + 1 / 12 < ratio < 1 + 1 / 6 for (which, _), ratio in fla.items() if which == forward)
    assert all(1.4 < ratio < 1.52 for (which, _), ratio in fla.items() if which == both)
    cudnn = [ms[which, kernels.ATTENTION, length] / ours[which, length] for which, length in ours]
    assert min(cudnn) == pytest.approx(2, abs=0.05)
    assert max(cudnn) == pytest.approx(20, abs=0.6)


def test_what_the_readme_says_of_mixers_is_in_the_results():
    """Forward and backward, from 1,025 tokens on."""
    stored = json.loads((RESULTS / "mixers.json").read_text())["records"]
    ms = {
        (r["mixer"], r["tokens"]): r["ms"] / r["batch"]
        for r in stored
        if r.get("ms") is not None and r["which"] == mixers.PASSES[1]
    }
    for tokens in (1025, 4097, 16385):
        retention = ms["retention, chunkwise", tokens]
        others = {name for name, n in ms if n == tokens and not name.startswith("retention")}
        assert {name for name in others if ms[name, tokens] < 0.8 * retention} == {"fnet"}
        assert retention / ms["linformer", tokens] == pytest.approx(1, abs=0.2)
        assert 0.4 <= round(retention / ms["performer", tokens], 1) <= 0.6
    ratio = ms["softmax", 16385] / ms["retention, chunkwise", 16385]
    assert f"attention takes {ratio:.0f} times as long" in (ROOT / "README.md").read_text()


def test_what_positions_and_stems_give_is_in_the_results():
    """Over pairs of rows of Vision X-formers that differ in one of them alone: mean and standard error."""
    value = {
        tuple(record.row.split(",")): 100 * record.result.value
        for record in read_records(RESULTS / "ablation_vix.json")
        if record.seed == 0
    }
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    for index, (before, after) in ((2, ("learned", "rope")), (1, ("linear", "conv_vix"))):
        gains = []
        for row in value:
            other = (*row[:index], after, *row[index + 1 :])
            if row[index] == before and other in value:
                gains.append(value[other] - value[row])
        error = np.std(gains, ddof=1) / len(gains) ** 0.5
        assert f"{np.mean(gains):.1f} ± {error:.1f} over {len(gains)} pairs" in text


def test_what_the_pages_say_of_mixers_of_three_seeds_is_in_the_results():
    values = defaultdict(list)
    for record in read_records(RESULTS / "ablation_vix.json"):
        values[record.row].append(100 * record.result.value)
    said = {
        f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}" for found in values.values() if len(found) == 3
    }
    assert len(said) == 6
    for page in ("README.md", "docs/results.md"):
        assert said <= set(re.findall(r"\d\d\.\d ± \d\.\d", (ROOT / page).read_text()))


def test_results_of_the_readme_are_those_of_the_recipes():
    """What a recipe's docstring says that it scored."""
    table = between_markers("README.md", "results")
    for line in rows(table)[2:]:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        recipe = re.match(r"`(\w+)", cells[0])[1]
        doc = " ".join((ROOT / "configs" / f"{recipe}.py").read_text().split())
        assert cells[-1] in doc, recipe
