"""What a step needs, as compiled: held against what it needed when it was last looked at.

After a change that is meant: `pytest tests/training --update-golden`, and look at the difference.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import pytest

from tests.test_configs import load
from vir_jax.parallel.mesh import make_mesh
from vir_jax.training.compile_report import compile_report, format_report, topology_devices

# Several processes of tests may compile for TPUs at a time.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
FOLDER = Path(__file__).parents[1] / "golden" / "compiled"
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs requirements-compile.txt"
)
# Versions of the compiler differ by less; a forgotten constraint or a doubled gradient by more.
TOLERANCE = 0.15


@functools.cache
def report(name, topology, fsdp, tensor):
    config, _ = load(name)
    config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
    config.accumulation_steps = 1  # A recipe for CPUs has more; each gathers parameters again.
    return compile_report(config, topology, num_classes=10, num_examples=1442)


@pytest.mark.parametrize(
    ("name", "topology", "fsdp", "tensor"),
    [
        ("vir_digits", "cpu:8", 2, 2),
        ("vir_cifar10", "cpu:8", 8, 1),
        pytest.param("vir_digits", "v5e:2x2", 2, 1, marks=needs_libtpu),
    ],
)
def test_memory_and_communication(name, topology, fsdp, tensor, request):
    compiled = report(name, topology, fsdp, tensor)
    found = {"memory": compiled.memory["total"]} | {
        kind: {"count": traffic.count, "bytes": traffic.bytes}
        for kind, traffic in compiled.collectives.items()
    }
    # For TPUs by the version of their compiler: that of jax 0.10 counts no temporaries in a step as small as this one.
    compiler = "" if topology.startswith("cpu") else "-jax" + ".".join(jax.__version__.split(".")[:2])
    path = FOLDER / f"{name}-{topology.replace(':', '-')}-fsdp{fsdp}-tensor{tensor}{compiler}.json"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    assert path.exists(), f"{path.name} is not there; --update-golden writes it"
    golden = json.loads(path.read_text())
    assert found.keys() == golden.keys()
    for key, value in golden.items():
        assert found[key] == pytest.approx(value, rel=TOLERANCE), key


@needs_libtpu
def test_a_kernel_needs_no_other_communication():
    config, _ = load("vir_digits")
    config.mesh.fsdp, config.mesh.tensor = 1, 2
    step = functools.partial(compile_report, topology="v5e:2x2", num_classes=10, num_examples=1442)
    by_xla = step(config)
    config.model.implementation = "pallas_tpu"
    assert step(config).collectives == by_xla.collectives


def test_a_kernel_is_asked_for():
    config, _ = load("vir_digits")
    config.model.implementation = "pallas_tpu"
    with pytest.raises(ValueError, match="'pallas_tpu' is a kernel for tpu, and this compiles for cpu"):
        compile_report(config, "cpu:8", num_classes=10, num_examples=1442)


def test_what_is_printed():
    compiled = report("vir_digits", "cpu:8", 2, 2)
    lines = format_report(compiled).splitlines()
    assert lines[:2] == ["devices        8 x cpu", "mesh           data=2, fsdp=2, tensor=2"]
    total = compiled.memory["total"]
    # What a CPU has is not known; of a device with one byte less than is needed it is.
    for capacity, fits, said in ((None, True, "not known: fits"), (total, True, "MiB: fits")):
        known = dataclasses.replace(compiled, capacity=capacity)
        assert known.fits == fits
        assert said in format_report(known)
    short = dataclasses.replace(compiled, capacity=total - 1)
    assert not short.fits
    assert "MiB: DOES NOT FIT" in format_report(short)
    flops = compiled.model_flops / 1e9
    assert f"model          {flops:,.1f} GFLOP per device and step" in lines
    after = lines[lines.index("communication  per device and step") + 1 :]
    assert [line.split()[0] for line in after] == list(compiled.collectives)
    assert "communication  none" in format_report(dataclasses.replace(compiled, collectives={}))


@needs_libtpu
def test_the_compiler_gives_up_on_too_large_a_step():
    """Two million images: the numbers are the compiler's."""
    config, _ = load("vir_digits")
    config.batch_size = 2**21
    compiled = compile_report(config, "v5e:2x2", num_classes=10, num_examples=2**22)
    assert not compiled.fits
    assert compiled.memory == {}
    assert re.search(r"(?i)out of memory.* hbm.*\d+\.\d+G.*15\.75G", compiled.overflow)
    assert f"does not fit   {compiled.overflow}" in format_report(compiled)


@pytest.mark.parametrize("topology", ["v5e", "cpu:0", "cpu:9", "2*cpu:2", "cpu:2x2", "gpu:8x"])
def test_unknown_topologies(topology):
    with pytest.raises(ValueError, match=r"topology '.*': expected"):
        topology_devices(topology)


@needs_libtpu
def test_several_slices():
    devices = topology_devices("2*v5e:2x2")
    mesh = make_mesh(-1, 4, 1, devices=devices)
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert slices == [[0] * 4, [1] * 4]
