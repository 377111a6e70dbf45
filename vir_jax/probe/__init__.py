"""What the features of a trained model are worth to others: nearest neighbours and a linear classifier on any layer."""

from vir_jax.probe.classifiers import linear_probe, nearest_neighbours
from vir_jax.probe.features import Features, extract

__all__ = ["Features", "extract", "linear_probe", "nearest_neighbours"]
