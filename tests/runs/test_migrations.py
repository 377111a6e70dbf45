import json

import pytest

from vir_jax.runs import migrations
from vir_jax.runs.config import default_config, flatten
from vir_jax.runs.migrations import migrate
from vir_jax.runs.workdir import check_resumable


def stored(**changes):
    """The default config as JSON, with fields changed by dotted name; `...` takes one out."""
    tree = json.loads(default_config().to_json())
    for name, value in changes.items():
        *sections, field = name.split(".")
        section = tree
        for key in sections:
            section = section[key]
        if value is ...:
            del section[field]
        else:
            section[field] = value
    return tree


def test_todays_config_passes_unchanged():
    config = migrate(stored(), where="here")
    assert config.to_json() == default_config().to_json()
    assert config.is_locked


def test_a_later_field_gets_its_default():
    before = stored(**{"model.position": ..., "max_skipped_steps": ...})
    config = migrate(before, where="here")
    assert (config.model.position, config.max_skipped_steps) == ("learned", 0)
    del before["mesh"]
    assert migrate(before, where="here").mesh.fsdp == 1


def test_a_field_that_was_renamed():
    old = stored(**{"model.drop_path": 0.4, "model.drop_path_rate": ...})
    assert migrate(old, where="here").model.drop_path_rate == 0.4
    with pytest.raises(ValueError, match=r"config.model.drop_path_rate twice"):
        migrate(stored(**{"model.drop_path": 0.4}), where="here")


@pytest.mark.parametrize(
    ("old", "today"),
    [
        ({"model.name": "vir_s16", "model.layer_scale": ...}, {"model.layer_scale": 1e-5}),
        ({"model.name": "vit_s16", "model.layer_scale": ...}, {"model.layer_scale": None}),
        ({"model.name": "vir_mu4"}, {"model.name": "vir_pico4"}),
        ({"model.remat": True}, {"model.remat": "full"}),
        ({"model.remat": False}, {"model.remat": "elementwise"}),
        ({"model.name": "vir_s16", "model.readout": "last"}, {"model.readout": "class_token"}),
        ({"model.name": "vit_s16", "model.readout": "first"}, {"model.readout": "class_token"}),
        ({"model.readout": "average"}, {"model.readout": "average"}),
        ({"augment.randaugment_ops": 2, "augment.color_jitter": 0.4}, {"augment.color_jitter": 0.0}),
        ({"augment.randaugment_ops": 0, "augment.color_jitter": 0.4}, {"augment.color_jitter": 0.4}),
        ({"model.name": "vir_s16", "model.stem": "linear"}, {"model.stem": None}),
        ({"model.name": "cvir_s16", "model.stem": "linear"}, {"model.stem": "linear"}),
        ({"mixing.mixup": 0.8, "mixing.mixup_alpha": ...}, {"mixing.mixup_alpha": 0.8}),
        ({"mixing.cutmix": 1.0, "mixing.cutmix_alpha": ...}, {"mixing.cutmix_alpha": 1.0}),
    ],
    ids=str,
)
def test_values_that_were_spelt_otherwise(old, today):
    migrated = flatten(migrate(stored(**old), where="here"))
    assert {name: migrated[name] for name in today} == today


@pytest.mark.parametrize("size", [96, [96], [96, 96]])
def test_one_image_size_has_one_spelling(size, tmp_path):
    assert migrate(stored(**{"model.image_size": size}), where="here").model.image_size == 96
    config = default_config()
    config.model.image_size = (96, 96)
    old = migrate(stored(**{"model.image_size": size}), where="here")
    check_resumable(tmp_path, old, config)
    with pytest.raises(ValueError, match=r"model.image_size: 96 -> 224"):
        check_resumable(tmp_path, old, default_config())


def test_a_field_that_no_version_knows_is_named():
    message = r"^the run has a field .* config.optim.momentum = 0.9; the nearest is config.optim"
    with pytest.raises(ValueError, match=message):
        migrate(stored(**{"optim.momentum": 0.9}), where="the run")


def test_a_value_of_another_type_is_named():
    with pytest.raises(ValueError, match=r"^the run has config.batch_size = 'many': "):
        migrate(stored(batch_size="many"), where="the run")


def test_names_are_dotted():
    assert flatten({"a": 1, "b": {"c": {"d": 2}, "e": []}}) == {"a": 1, "b.c.d": 2, "b.e": []}


def test_the_table_is_of_fields_that_exist():
    known = flatten(json.loads(default_config().to_json()))
    assert known.keys() >= set(migrations.RENAMED.values())
    assert not known.keys() & migrations.RENAMED.keys()
