"""Classifiers that learn nothing of the model: they see its features alone."""

import warnings

import numpy as np
from absl import logging
from jaxtyping import Float
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vir_jax.probe.features import Features


def nearest_neighbours(train: Features, test: Features, *, neighbours: int = 20) -> float:
    """Return the top-1 of the class that most of the nearest training images have, by cosine similarity.

    Args:
        train: with the classes of `test`.
        test: to be classified.
        neighbours: that vote; fewer where there are no more training images.
    """
    voters = min(neighbours, len(train.labels))
    classifier = KNeighborsClassifier(voters, metric="cosine").fit(_directions(train), train.labels)
    return float(classifier.score(_directions(test), test.labels))


def linear_probe(train: Features, test: Features, *, strength: float = 1.0, steps: int = 1000) -> float:
    """Return the top-1 of a logistic regression on features of mean 0 and variance 1.

    Args:
        train: with the classes of `test`.
        test: to be classified.
        strength: C of `LogisticRegression`; the smaller, the more its weights are held near 0.
        steps: of the solver, at most.
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=steps))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        classifier.fit(train.values, train.labels)
    if any(issubclass(warning.category, ConvergenceWarning) for warning in caught):
        logging.warning("the linear probe on %s had not converged after %d steps", train.layer, steps)
    return float(classifier.score(test.values, test.labels))


def _directions(features: Features) -> Float[np.ndarray, "n c"]:
    """Return features of length 1, so that those of length 0, of which there is no cosine, have no neighbours."""
    lengths = np.linalg.norm(features.values, axis=1, keepdims=True)
    return features.values / np.maximum(lengths, np.finfo(np.float32).tiny)
