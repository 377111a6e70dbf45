"""A model as a program: python -m vir_jax.deploy runs/vir_b FOLDER [--format=stablehlo|onnx] [--stream].

The model is a run's, a folder of weights or a name of the zoo (`vir_jax.weights.zoo`). The program takes uint8 images,
any number of them, and gives logits; weights and normalisation are inside. It is read again and compared with the model
before the command says that it is done. With --stream it is the step that reads a row of patches, state in, state out.
"""

from absl import app, flags

from vir_jax import command_line
from vir_jax.deploy import write_onnx, write_stablehlo, write_stream
from vir_jax.paths import PathError, check_path
from vir_jax.runs.log import quiet_libraries
from vir_jax.weights import open_model

FORMAT = flags.DEFINE_enum("format", "stablehlo", ["stablehlo", "onnx"], "of the program")
STREAM = flags.DEFINE_bool("stream", False, "stablehlo: the streaming step")
WIDTH = flags.DEFINE_integer("width", None, "of --stream, pixels; default: that of training", lower_bound=1)
HEIGHT = flags.DEFINE_integer("height", None, "of --stream, pixels; default: that of training", lower_bound=1)
PLATFORMS = flags.DEFINE_list("platforms", ["cpu"], "stablehlo: that it runs on, of cpu, cuda, rocm, tpu")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "of a run: 'last', 'best' or the number of a step")
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["raw", "ema"], "of a run; default: the average where there is one"
)


def main(argv: list[str]) -> None:
    """Write, compare, and say how far the program is from the model."""
    if len(argv) != 3:
        raise app.UsageError("expected: python -m vir_jax.deploy WORKDIR_OR_WEIGHTS FOLDER")
    if STREAM.value and FORMAT.value == "onnx":
        raise app.UsageError("--stream is of --format=stablehlo")
    if not STREAM.value and (WIDTH.value or HEIGHT.value):
        raise app.UsageError("--width and --height are of --stream")
    quiet_libraries()
    try:
        folder = check_path(argv[2], "the folder")
    except PathError as error:
        raise app.UsageError(str(error)) from error
    model = open_model(argv[1], checkpoint=CHECKPOINT.value, weights=WEIGHTS.value)
    if STREAM.value:
        difference = write_stream(
            folder, model, width=WIDTH.value, height=HEIGHT.value, platforms=PLATFORMS.value
        )
    elif FORMAT.value == "onnx":
        difference = write_onnx(folder, model)
    else:
        difference = write_stablehlo(folder, model, platforms=PLATFORMS.value)
    command_line.write_line(f"{folder}: relative RMS difference from the model's logits {difference:.1e}")


if __name__ == "__main__":
    command_line.run(main)
