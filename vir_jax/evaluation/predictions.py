"""What a classifier says of each image of a data set."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vir_jax.data import Source
from vir_jax.tasks.classification import Classification, check_classifies
from vir_jax.training.evaluation_data import EvaluationData

UNREADABLE = "it could not be read"


class Predictions:
    """The most probable class of each image; an observer of `evaluate_workdir`, of one evaluation set.

    All arrays are of the images that could be read, in the order of the data.
    """

    def __init__(self) -> None:
        self._data: EvaluationData | None = None
        self._batches: list[tuple[np.ndarray, ...]] = []

    def __call__(
        self, data: EvaluationData, outputs: Float[np.ndarray, "b ..."], batch: Mapping[str, Any]
    ) -> None:
        """Add a batch.

        Raises:
          ValueError: the model is no classifier, or the batch is of another evaluation set.
        """
        check_classifies(data.task)
        assert isinstance(data.task, Classification)
        if self._data not in (None, data):
            raise ValueError("predictions are of one evaluation set: name it by `evaluations`")
        self._data = data
        probabilities = np.asarray(data.task.probabilities(jnp.asarray(outputs)))
        predicted = np.argmax(probabilities, axis=1)
        probable = np.take_along_axis(probabilities, predicted[:, None], axis=1)[:, 0]
        self._batches.append((np.asarray(batch["label"]), predicted, probable, np.asarray(batch["mask"])))

    @property
    def data(self) -> EvaluationData:
        """What was evaluated on."""
        assert self._data is not None, "no batch was observed"
        return self._data

    @property
    def source(self) -> Source:
        """The images."""
        return self.data.source

    @property
    def labels(self) -> Int[np.ndarray, " n"]:
        """Numbers of the classes that the images are of."""
        return self._column(0)

    @property
    def predicted(self) -> Int[np.ndarray, " n"]:
        """Numbers of the most probable classes."""
        return self._column(1)

    @property
    def probability(self) -> Float[np.ndarray, " n"]:
        """Of these classes."""
        return self._column(2)

    def _column(self, number: int) -> np.ndarray:
        return np.concatenate([batch[number] for batch in self._batches])[self._read]

    @property
    def _read(self) -> Bool[np.ndarray, " all"]:
        return np.concatenate([batch[3] for batch in self._batches])

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield for each image its name, and label, predicted class and its probability, or why there is none."""
        names = self.source.class_names
        rows = zip(self.labels, self.predicted, self.probability, strict=True)
        for index, read in enumerate(self._read[: len(self.source)]):
            found: dict[str, Any] = {"error": UNREADABLE}
            if read:
                label, predicted, probability = next(rows)
                found = {
                    "label": names[label],
                    "predicted": names[predicted],
                    "probability": round(float(probability), 6),
                }
            yield {"name": self.source.name(index), **found}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `lines` as a JSONL file."""
        with Path(path).open("w") as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines())
