"""A model as ONNX, by jax2onnx: `pip install "vir-jax[export]"`."""

import os

import numpy as np

from vir_jax.deploy.program import (
    COMPARED,
    check_same,
    constants,
    forward,
    image_shape,
    new_folder,
    random_images,
    write_card,
)
from vir_jax.weights import PretrainedModel

FILE = "model.onnx"
INPUT, OUTPUT = "images", "logits"


def write_onnx(folder: str | os.PathLike[str], pretrained: PretrainedModel) -> float:
    """Write a model as an ONNX graph of uint8 images [b, y, x, colours], b free, to logits; run and compare it.

    The mixer is in its parallel form, where it has one: products of matrices.

    Args:
        folder: made where it is absent.
        pretrained: the model.

    Returns:
        The relative RMS difference of ONNX Runtime's logits from the model's.

    Raises:
        ModuleNotFoundError: jax2onnx or ONNX Runtime is not installed.
        FileExistsError: the folder holds a program.
        DeployError: the graph gives something else.
    """
    try:
        import jax
        import onnxruntime
        from jax2onnx import to_onnx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"ONNX is an optional extra, and {error.name} is not here: pip install 'vir-jax[export]', or jax2onnx and"
            " onnxruntime"
        ) from error
    shape = image_shape(pretrained)
    path = new_folder(folder)
    mode = "parallel" if "parallel" in pretrained.model.modes else "auto"
    classify = forward(constants(pretrained), mode=mode)
    taken = jax.ShapeDtypeStruct(("b", *shape), np.uint8)
    to_onnx(
        classify,
        [taken],
        model_name=pretrained.card.model["name"],
        return_mode="file",
        output_path=str(path / FILE),
        input_names=[INPUT],
        output_names=[OUTPUT],
    )
    found = {
        "format": "onnx",
        "files": {"model": FILE},
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["b", *shape]},
        "output": {
            "name": OUTPUT,
            "dtype": "float32",
            "shape": ["b", pretrained.card.num_classes],
            "is": "logits",
        },
        "mode": mode,
    }
    write_card(path, pretrained, found)
    session = onnxruntime.InferenceSession(str(path / FILE), providers=["CPUExecutionProvider"])
    images = random_images((COMPARED, *shape))
    (logits,) = session.run([OUTPUT], {INPUT: images})
    return check_same(logits, jax.jit(classify)(images), str(path / FILE))
