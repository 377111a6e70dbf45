"""Kernels held against the specification as other forms are; and compiled for TPUs and GPUs.

They run in interpret mode, or compiled where the machine is one that they are for.
"""

import importlib.util
import os
import pkgutil
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.ops.cases import KERNELS, NEEDS, assert_close, assert_transforms_agree, random_case, relative_rms
from vir_jax.ops import kernels, retention, sequence
from vir_jax.ops.kernels import cpp_cpu, mosaic_gpu, pallas_tpu, tensor_cores
from vir_jax.ops.kernels.pallas_tpu import CHUNK_SIZE, ONE_CHUNK
from vir_jax.ops.reference import naive_retention, naive_retention_gradients
from vir_jax.parallel.mesh import make_mesh
from vir_jax.training.compile_report import topology_devices

# Several processes of tests may compile for TPUs at a time.
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def plugins():
    """JAX's for other platforms."""
    try:
        import jax_plugins
    except ModuleNotFoundError:
        return []
    return [module.name for module in pkgutil.iter_modules(jax_plugins.__path__)]


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="compiling for TPUs needs requirements-compile.txt"
)
TPUS = ("v5e:2x2", "v6e:2x2")
HALF = (jnp.bfloat16, jnp.float16)
needs_cuda = pytest.mark.skipif(
    not any(name.startswith("xla_cuda") for name in plugins()),
    reason="compiling for GPUs needs requirements-compile-gpu.txt",
)
FP32 = 3e-6


def run(case, name, **options):
    """Output and final state, and the gradients of everything differentiable."""

    def op(*arguments):
        q, k, v, log_decay, state = arguments
        return retention(q, k, v, log_decay, initial_state=state, implementation=name, **options)

    @jax.jit
    def results_and_gradients(arguments, cotangents):
        results, pull_back = jax.vjp(op, *arguments)
        return results, pull_back(cotangents)

    return results_and_gradients(case.arguments, case.cotangents)


SHAPES = {
    "pallas_tpu": [
        (1, 3, 8, 5),  # widths of no lane's size: all heads at once
        (63, 2, 64, 64),
        (197, 4, 64, 32),  # one chunk; four heads a step
        (ONE_CHUNK + 1, 2, 128, 64),  # a last chunk of one token
        (321, 4, 32, 32),
        (4 * CHUNK_SIZE, 1, 64, 128),  # whole chunks
    ],
    # Each head is a program of its own, and takes seconds to interpret.
    "mosaic_gpu": [
        (1, 3, 8, 5),
        (63, 2, 64, 64),
        (197, 1, 64, 32),
        (4 * tensor_cores.BLOCK + 1, 1, 128, 64),
        (4 * tensor_cores.BLOCK, 1, 64, 128),
        (1100, 1, 64, 64),  # two segments, the second one shorter
    ],
    "cpp_cpu": [
        (1, 3, 8, 5),  # widths of no vector's size
        (31, 2, 64, 64),
        (65, 4, 64, 32),  # a last chunk of one token
        (197, 3, 24, 72),  # three vectors a row, and nine
        (128, 1, 130, 4),  # whole chunks
    ],
}


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize(
    ("name", "n", "h", "d", "e"),
    [
        pytest.param(*kernel.values, *shape, marks=kernel.marks)
        for kernel in KERNELS
        for shape in SHAPES[kernel.values[0]]
    ],
)
def test_agrees_with_the_reference(name, n, h, d, e):
    case = random_case(b=1, n=n, h=h, d=d, e=e)
    arrays = list(map(np.asarray, case))
    assert_close(run(case, name), (naive_retention(*arrays[:5]), naive_retention_gradients(*arrays)), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", HALF)
def test_errors_are_those_of_xla(name, dtype):
    case = random_case(b=1, n=500, h=2, d=64, e=64)
    half = case._replace(**{x: getattr(case, x).astype(dtype) for x in ("q", "k", "v", "d_out")})
    rounded = [np.asarray(x, np.float64) for x in half]
    expected = naive_retention(*rounded[:5]), naive_retention_gradients(*rounded)
    ours, xla = run(half, name), run(half, "xla")
    for value, other in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
        assert value.dtype == other.dtype
    for value, other, exact in zip(*map(jax.tree.leaves, (ours, xla, expected)), strict=True):
        assert relative_rms(value, exact) <= 1.02 * relative_rms(other, exact) + 1e-6


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", KERNELS)
def test_decays_at_the_ends_of_their_range(name):
    case = random_case(b=1, n=300)._replace(log_decay=jnp.array([0.0, -1e-7, -120.0]))
    arrays = list(map(np.asarray, case))
    assert_close(run(case, name), (naive_retention(*arrays[:5]), naive_retention_gradients(*arrays)), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", KERNELS)
def test_without_states(name):
    case = random_case(n=300, d=64, e=64, h=2)
    ours = jax.jit(partial(retention, implementation=name))(*case.tokens, case.log_decay)
    assert_close(ours, retention(*case.tokens, case.log_decay), FP32)


# The interpreter of GPU kernels has effects that `remat` cannot have.
needs_gpu = pytest.mark.skipif("jax.default_backend() != 'gpu'", reason="cannot be interpreted")


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize(
    "name",
    ["pallas_tpu", pytest.param("mosaic_gpu", marks=needs_gpu), pytest.param("cpp_cpu", marks=NEEDS["cpu"])],
)
def test_vmap_jit_and_remat(name):
    assert_transforms_agree(partial(retention, implementation=name), random_case(b=4, n=20), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", KERNELS)
def test_vmap_over_sequences(name):
    case = random_case(n=20)
    each = jax.vmap(lambda q, k, v: retention(q, k, v, case.log_decay, implementation=name))
    out, state = each(*(x[:, None] for x in case.tokens))
    assert_close((out[:, 0], state[:, 0]), retention(*case.tokens, case.log_decay), FP32)


@pytest.mark.usefixtures("kernels_run")
@pytest.mark.parametrize("name", KERNELS)
def test_vmap_over_decays(name):
    case = random_case(n=20)
    decays = jnp.stack([case.log_decay, 2 * case.log_decay])
    both = jax.vmap(lambda a: retention(*case.tokens, a, implementation=name))(decays)
    for *ours, log_decay in zip(*both, decays, strict=True):
        assert_close(ours, retention(*case.tokens, log_decay), FP32)


@pytest.mark.skipif("jax.device_count() < 8", reason="eight devices, on a CPU simulated ones")
@pytest.mark.usefixtures("kernels_run")
def test_batch_and_heads_over_devices():
    case = random_case(b=4, n=300, h=4, d=64, e=64)

    def loss(implementation, *arguments):
        return jnp.sum(jnp.sin(retention(*arguments, implementation=implementation)[0]))

    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    tokens, heads = P("data", None, "tensor"), P("tensor")
    total = jax.shard_map(
        lambda *x: jax.lax.psum(loss("pallas_tpu", *x), ("data", "tensor")),
        mesh=mesh,
        in_specs=(tokens, tokens, tokens, heads),
        out_specs=P(),
        check_vma=False,  # interpret mode does not track it
    )
    ours = jax.jit(jax.grad(total, range(3)))(*case.arguments[:4])
    assert_close(ours, jax.grad(partial(loss, "xla"), range(3))(*case.arguments[:4]), FP32)


def test_a_kernel_is_used_or_an_error_says_why_not(kernels_run):
    case = random_case(n=4)
    with pytest.raises(
        ValueError,
        match="unknown implementation 'triton'; expected one of 'xla', 'mosaic_gpu', 'pallas_tpu', 'cpp_cpu'",
    ):
        retention(*case.tokens, case.log_decay, implementation="triton")
    for options in ({"mode": "parallel"}, {"chunk_size": 8}):
        with pytest.raises(ValueError, match="computes the chunkwise mode in chunks of its own"):
            retention(*case.tokens, case.log_decay, implementation="pallas_tpu", **options)
    wide = random_case(n=4, d=64, e=160)
    with pytest.raises(ValueError, match="'mosaic_gpu' takes key and value widths up to 128; got 64 and 160"):
        retention(*wide.tokens, wide.log_decay, implementation="mosaic_gpu")


@pytest.mark.skipif("jax.device_count() < 8", reason="eight devices, on a CPU simulated ones")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_kernel_does_not_compute_everything_on_every_device(kernels_run, axis_type):
    case = random_case(b=4, n=4, h=4)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(axis_type,) * 2)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"each device of \{'data': 4, 'tensor': 2\} would"),
    ):
        jax.jit(partial(retention, implementation="pallas_tpu"))(*case.tokens, case.log_decay)


def test_a_kernel_wants_its_platform():
    case, here = random_case(n=4), jax.default_backend()
    name, platform = next(each for each in kernels.PLATFORMS.items() if each[1] != here)
    with pytest.raises(
        ValueError, match=f"'{name}' is a kernel for {platform}, and this compiles for {here}"
    ):
        retention(*case.tokens, case.log_decay, implementation=name)


def test_the_interpreter_cuts_off_what_tensor_cores_do():
    """No sum is larger than the exact one, and none is off by a whole digit."""
    rng = np.random.default_rng(0)
    x, y = (
        (rng.normal(size=(64, 64)) * 10.0 ** rng.integers(-6, 6, (64, 64))).astype(np.float32)
        for _ in range(2)
    )
    exact = x.astype(np.float64) + y
    found = np.asarray(tensor_cores._cut_off_sum(jnp.asarray(x), jnp.asarray(y)), np.float64)
    assert (np.abs(found) <= np.abs(exact)).all()
    assert (np.abs(exact - found) < np.spacing(np.abs(exact).astype(np.float32))).all()
    assert (np.abs(exact - found) > 0.6 * np.spacing(np.abs(exact).astype(np.float32))).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_parts_add_up_to_the_digits_that_they_have(dtype):
    """Eight a part: one of bfloat16 is exact, two of fp16; of fp32 two keep 15 bits, three all."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=1000), dtype)
    exact = np.asarray(x, np.float64)
    for count, bits in ((1, 8), (2, 15), (3, 24)):
        parts = [np.asarray(part, np.float64) for part in tensor_cores.split(x, count)]
        errors = np.abs(sum(parts) - exact)
        assert (errors <= 2.0**-bits * np.abs(exact)).all()
        if count >= tensor_cores.PARTS[jnp.dtype(dtype).name]:
            assert errors.max() == 0


@pytest.mark.parametrize(
    ("device_kind", "dtype", "n", "width", "expected"),
    [
        ("NVIDIA H200", jnp.bfloat16, 197, 64, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 128, 32, "mosaic_gpu"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 197, 64, None),
        ("NVIDIA H200", jnp.float32, 197, 64, None),
        ("NVIDIA H200", jnp.bfloat16, 127, 64, None),
        ("NVIDIA H200", jnp.bfloat16, 197, 65, None),
        ("TPU v5 lite", jnp.bfloat16, 197, 64, None),
        ("cpu", jnp.bfloat16, 197, 64, None),
    ],
)
def test_a_kernel_is_chosen_where_it_was_measured(device_kind, dtype, n, width, expected):
    assert kernels.chosen_kernel(device_kind, dtype, n, width) == expected


def test_what_is_chosen_is_taken(monkeypatch):
    case = random_case(b=1, n=130, h=1, d=64, e=64)
    halves = [x.astype(jnp.bfloat16) for x in case.tokens]
    monkeypatch.setattr(kernels, "HOPPER", (jax.devices()[0].device_kind,))
    taken = []
    monkeypatch.setattr(
        sequence, "kernel_form", lambda name: taken.append(name) or sequence.choose_form("chunkwise", 130)
    )

    def kernel_of(*tokens, **options):
        jax.clear_caches()
        taken.clear()
        jax.eval_shape(partial(retention, **options), *tokens, case.log_decay[:1])
        return list(taken)

    assert kernel_of(*halves) == kernel_of(*halves, mode="chunkwise") == ["mosaic_gpu"]
    assert not kernel_of(*case.tokens)  # fp32
    for options in ({"mode": "parallel"}, {"chunk_size": 64}, {"implementation": "xla"}):
        assert not kernel_of(*halves, **options)


def hopper():
    """An H100 that is not there."""
    description = (Path(__file__).parent / "h100.textproto").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1").devices


def compiled(name, devices, dtype, b, n, h, d, e, transform=lambda op, mesh: op):
    """Output, final state and all gradients but the decay's, the batch over the devices."""

    def op(q, k, v, log_decay, state):
        return retention(q, k, v, log_decay, initial_state=state, implementation=name)

    def gradients(arguments, cotangents):
        results, pull_back = jax.vjp(transform(op, mesh), *arguments)
        dq, dk, dv, _, d_state = pull_back(cotangents)
        return results, dq, dk, dv, d_state

    qk, v = (jax.ShapeDtypeStruct((b, n, h, width), dtype) for width in (d, e))
    log_decay, state = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((h,), (b, h, d, e)))
    mesh = make_mesh(data=-1, fsdp=1, tensor=1, devices=devices)
    with jax.set_mesh(mesh):
        return jax.jit(gradients).lower((qk, qk, v, log_decay, state), (v, state)).compile()


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "dtype", "n", "h", "d", "e"),
    [
        *((topology, dtype, 4097, 12, 64, 64) for topology in TPUS for dtype in (*HALF, jnp.float32)),
        ("v5e:2x2", jnp.bfloat16, 197, 6, 64, 64),
        ("v5e:2x2", jnp.bfloat16, 577, 4, 128, 32),
        ("v5e:2x2", jnp.float32, 65, 3, 32, 64),
    ],
)
def test_compiles_for_tpus(topology, dtype, n, h, d, e):
    program = compiled("pallas_tpu", topology_devices(topology)[:1], dtype, 1, n, h, d, e).as_text()
    # Forward, and one for each of q, k and v.
    assert program.count('custom_call_target="tpu_custom_call"') == 4


def _over_devices(op, mesh):
    tokens, state = P("data"), P("data")
    return jax.shard_map(
        op, mesh=mesh, in_specs=(tokens, tokens, tokens, P(), state), out_specs=(tokens, state)
    )


def _mapped(op, mesh):
    return lambda *x: jax.tree.map(
        lambda y: y[0], jax.vmap(op, (0, 0, 0, None, 0))(*(y[None] if y.ndim > 1 else y for y in x))
    )


@needs_libtpu
@pytest.mark.parametrize(
    ("b", "transform"), [(4, _over_devices), (1, _mapped), (1, lambda op, _: jax.checkpoint(op))]
)
def test_transformed_kernels_compile(b, transform):
    devices = topology_devices("v5e:2x2")[:b]
    program = compiled("pallas_tpu", devices, jnp.bfloat16, b, 300, 4, 64, 64, transform).as_text()
    assert program.count('custom_call_target="tpu_custom_call"') >= 4


@needs_libtpu
def test_a_broken_kernel_does_not_compile(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "ONE_CHUNK", 2048)  # A mask of 32 MB.
    with pytest.raises(Exception, match=r"(?i)vmem"):
        compiled("pallas_tpu", topology_devices("v5e:2x2")[:1], jnp.bfloat16, 1, 2048, 2, 64, 64)


@needs_cuda
@pytest.mark.parametrize(
    ("dtype", "b", "n", "h", "d", "e", "passes"),
    [
        *((dtype, 8, 577, 64, 64, 64, 1) for dtype in (*HALF, jnp.float32)),
        *((dtype, 8, 197, 64, 128, 128, 1) for dtype in (*HALF, jnp.float32)),
        (jnp.bfloat16, 1, 4097, 12, 64, 64, 2),
        (jnp.bfloat16, 1, 197, 3, 32, 48, 1),
    ],
)
def test_compiles_for_hopper(dtype, b, n, h, d, e, passes):
    program = compiled("mosaic_gpu", hopper(), dtype, b, n, h, d, e).as_text()
    assert program.count('custom_call_target="mosaic_gpu') == 4 * passes


@needs_cuda
@pytest.mark.parametrize("transform", [_over_devices, _mapped, lambda op, _: jax.checkpoint(op)])
def test_transformed_kernels_compile_for_hopper(transform):
    program = compiled("mosaic_gpu", hopper(), jnp.bfloat16, 1, 300, 4, 64, 64, transform).as_text()
    assert program.count('custom_call_target="mosaic_gpu') >= 4


@needs_cuda
def test_a_broken_kernel_does_not_compile_for_hopper(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "BLOCK", 48)  # wgmma takes 64 rows.
    with pytest.raises(Exception, match="64"):
        compiled("mosaic_gpu", hopper(), jnp.bfloat16, 1, 300, 4, 64, 64)


def test_without_a_compiler_an_error_says_what_to_do(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(RuntimeError, match=r"'no-such-compiler -O1' is not there: .*'xla'"):
        cpp_cpu._register.__wrapped__()  # built before, it is not built again


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_what_the_compiler_says_is_in_the_error(monkeypatch, tmp_path):
    source = tmp_path / "kernel.cc"
    source.write_text("#error no such processor\n")
    monkeypatch.setattr(cpp_cpu, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"(?s)'cpp_cpu' was not built.*kernel\.cc.*no such processor"):
        cpp_cpu._register.__wrapped__()
