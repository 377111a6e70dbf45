import pytest

from vir_jax.runs.config import default_config
from vir_jax.runs.workdir import check_config, compare, write_config


def test_differences_are_named():
    assert compare({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}) == {
        "a.c": "2 -> 3",
        "d": "'(absent)' -> None",
    }


def test_another_model_is_refused_and_logging_is_free(tmp_path, caplog):
    check_config(tmp_path, default_config())
    write_config(tmp_path, default_config())
    check_config(tmp_path, default_config())
    config = default_config()
    config.log_every = 7
    config.epochs = 400.0
    with caplog.at_level("INFO"):
        check_config(tmp_path, config)
    assert "log_every changed on resume: 100 -> 7" in caplog.text
    assert "epochs changed on resume: 10.0 -> 400.0" in caplog.text
    config.model.name = "vir_b16"
    config.seed = 1
    with pytest.raises(ValueError, match=r"(?s)model.name: 'vir_s16' -> 'vir_b16'.*seed: 0 -> 1"):
        check_config(tmp_path, config)
