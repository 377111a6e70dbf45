import json

import pytest

from vir_jax.runs import migrations
from vir_jax.runs.config import default_config
from vir_jax.runs.migrations import flatten, migrate
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
    assert isinstance(config.model.image_size, tuple)


def test_a_later_field_gets_its_default():
    before = stored(**{"model.position": ..., "max_skipped_steps": ...})
    config = migrate(before, where="here")
    assert (config.model.position, config.max_skipped_steps) == ("learned", 0)
    del before["mesh"]
    assert migrate(before, where="here").mesh.fsdp == 1


def test_a_later_field_may_have_meant_something_else(monkeypatch):
    monkeypatch.setitem(
        migrations.ABSENT,
        "model.readout",
        lambda fields: "last" if fields["model.name"].startswith("vir") else "first",
    )
    for name, readout in (("vir_s16", "last"), ("vit_s16", "first")):
        before = stored(**{"model.name": name, "model.readout": ...})
        assert migrate(before, where="here").model.readout == readout
    assert migrate(stored(**{"model.readout": "average"}), where="here").model.readout == "average"


def test_a_field_that_was_renamed(monkeypatch):
    monkeypatch.setitem(migrations.RENAMED, "model.stochastic_depth", "model.drop_path")
    old = stored(**{"model.stochastic_depth": 0.4, "model.drop_path": ...})
    assert migrate(old, where="here").model.drop_path == 0.4
    with pytest.raises(ValueError, match=r"config.model.drop_path twice"):
        migrate(stored(**{"model.stochastic_depth": 0.4}), where="here")


def test_a_value_that_is_spelt_otherwise(monkeypatch):
    monkeypatch.setitem(migrations.RENAMED, "model.kind", "model.name")
    monkeypatch.setitem(migrations.RESPELT, "model.name", lambda name: name.replace("_small", "_s"))
    old = stored(**{"model.kind": "vir_small16", "model.name": ...})
    assert migrate(old, where="here").model.name == "vir_s16"


@pytest.mark.parametrize("size", [96, [96], [96, 96]])
def test_one_image_size_has_one_spelling(size, tmp_path):
    assert migrate(stored(**{"model.image_size": size}), where="here").model.image_size == (96, 96)
    config = default_config()
    config.model.image_size = (96,)
    old = migrate(stored(**{"model.image_size": size}), where="here")
    check_resumable(tmp_path, old, config)
    with pytest.raises(ValueError, match=r"model.image_size: \[96, 96\] -> \[224, 224\]"):
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


def test_the_tables_are_of_fields_that_exist():
    known = flatten(json.loads(default_config().to_json()))
    assert known.keys() >= {*migrations.RENAMED.values(), *migrations.RESPELT, *migrations.ABSENT}
    assert not known.keys() & migrations.RENAMED.keys()
