import pytest

from vir_jax.runs.config import default_config, parse_arguments, validate


def test_default_is_valid():
    validate(default_config())


def test_unknown_field_names_the_nearest():
    config = default_config()
    with pytest.raises(AttributeError, match='Did you mean "weight_decay"'):
        config.optim.weigth_decay = 0.1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 0, "config.batch_size is 0; expected a positive number"),
        ("batch_size", 7, "even number, as mixup and cutmix mix pairs"),
        ("accumulation_steps", 3, "a divisor of batch_size=4096"),
        ("ema_decay", 1.0, r"config.ema_decay is 1.0; expected a number in \[0, 1\)"),
        ("optim.name", "sgd", "'adamw' or 'lamb'"),
        ("optim.warmup_epochs", 400.0, "less than epochs=310"),
        ("optim.lr", -1.0, "config.optim.lr is -1.0; expected a positive number"),
        ("data.crop_fraction", 1.5, r"a fraction in \(0, 1\]"),
        ("model.dtype", "float16", "'float32' or 'bfloat16'"),
    ],
)
def test_bad_values_are_named(field, value, message):
    config = default_config()
    section, _, key = field.rpartition(".")
    (config[section] if section else config)[key] = value
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_a_kernel_is_for_some_modes():
    config = default_config()
    config.model.implementation, config.model.mode = "pallas_tpu", "parallel"
    with pytest.raises(
        ValueError, match=r"config\.model\.mode is 'parallel'; expected 'auto' or 'chunkwise'"
    ):
        validate(config)


def test_arguments_are_typed():
    values = parse_arguments("epochs=3,model=vit_mu1,flag=True", epochs=1.0, model="vir_mu1", flag=False)
    assert values.to_dict() == {"epochs": 3.0, "model": "vit_mu1", "flag": True}
    assert parse_arguments(None, epochs=1.0).epochs == 1.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("epoch=3", "unknown config argument 'epoch'; did you mean 'epochs'"),
        ("epochs", "not of the form name=value"),
        ("epochs=many", "no Python value"),
        ("steps=1.5", "should be of type int"),
    ],
)
def test_bad_arguments(argument, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(argument, epochs=1.0, steps=1)
