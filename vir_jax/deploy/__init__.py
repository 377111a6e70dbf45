"""Models as programs for machines without vir_jax: StableHLO (`jax.export`), and ONNX.

`write_stablehlo` and `write_onnx` write a folder that holds the program, weights inside, and a card; what they wrote is
read again and compared. `load_program` and `load_stream` read StableHLO in JAX.
"""

from vir_jax.deploy.onnx import write_onnx
from vir_jax.deploy.program import DeployError
from vir_jax.deploy.stablehlo import Program, load_program, write_stablehlo
from vir_jax.deploy.stream import StreamProgram, load_stream, write_stream

__all__ = [
    "DeployError",
    "Program",
    "StreamProgram",
    "load_program",
    "load_stream",
    "write_onnx",
    "write_stablehlo",
    "write_stream",
]
