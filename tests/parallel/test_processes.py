import jax
import pytest

from vir_jax.parallel.processes import initialize, sum_over_processes


def test_a_process_without_a_cluster_is_alone(monkeypatch):
    def initialize_nothing(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize_nothing)
    initialize()
    assert sum_over_processes(3) == 3


def test_mistakes_are_not_taken_for_being_alone(monkeypatch):
    def initialize_wrongly(*args, **kwargs):
        raise ValueError("process_id and num_processes must be nonnegative, with process_id < num_processes.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize_wrongly)
    with pytest.raises(ValueError, match="process_id < num_processes"):
        initialize("localhost:1", 2, 2)
    with pytest.raises(ValueError, match="process_id < num_processes"):
        initialize()


def test_all_or_nothing():
    with pytest.raises(ValueError, match="num_processes None, process_id 0: expected all three"):
        initialize("localhost:1", None, 0)
