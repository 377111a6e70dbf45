"""A config that cannot run is refused before data are opened, anything is compiled or a file is written."""

import jax
import pytest

import vir_jax.training.loop
from vir_jax.parallel.mesh import make_mesh
from vir_jax.training.loop import train
from vir_jax.training.plan import TrainingPlan, check_on_mesh, step_config
from vir_jax.training.step import StepConfig

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.mode", "sideways", r"config\.model\.mode='sideways'; expected one of"),
        ("model.name", "vir_x4", "no model is called 'vir_x4'"),
        ("model.remat", "dots", r"config\.model\.remat='dots'; expected one of"),
        ("model.image_size", 10, r"config\.model: an image of 10 x 10 pixels does not divide"),
        ("seed", -1, r"config\.seed is -1; expected"),
        ("augment.hflip", 2, r"config\.augment\.hflip is 2"),
        ("data.mean", (127.5, 127.5, 127.5), r"config\.data\.mean is"),
        ("data.std", (0.0, 0.0, 0.0), r"config\.data\.std is"),
        ("mesh.data", 0, r"config\.mesh\.data is 0"),
        ("mesh.data", 3, r"mesh data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ("batch_size", 36, r"config\.batch_size is 36, which the mesh .* does not divide"),
        ("eval_batch_size", 36, r"config\.eval_batch_size is 36, which the mesh .* does not divide"),
        ("accumulation_steps", 16, r"config\.batch_size is 64, .* times accumulation_steps = 16"),
        ("model.implementation", "pallas_tpu", "'pallas_tpu' is a kernel for tpu, and this compiles for cpu"),
    ],
)
def test_all_of_a_config_is_checked_first(tmp_path, digits_config, monkeypatch, field, value, message):
    def never(*arguments, **options):
        raise AssertionError("it was compiled, or data were opened")

    monkeypatch.setattr(vir_jax.training.loop, "open_sources", never)
    monkeypatch.setattr(TrainingPlan, "compile", never)
    section, _, key = field.rpartition(".")
    (digits_config[section] if section else digits_config)[key] = value
    workdir = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(digits_config, workdir)
    assert not workdir.exists()


def test_what_fits_a_mesh_passes(digits_config):
    check_on_mesh(digits_config, make_mesh(**MESH))
    check_on_mesh(digits_config, make_mesh(devices=jax.devices()[:1]))


def test_the_step_takes_what_the_config_says(digits_config):
    """Each number comes through under its own name."""
    digits_config.seed, digits_config.ema_decay, digits_config.accumulation_steps = 11, 0.75, 4
    digits_config.reduce_dtype = "bfloat16"
    assert step_config(digits_config) == StepConfig(
        seed=11, ema_decay=0.75, accumulation_steps=4, reduce_dtype="bfloat16"
    )
