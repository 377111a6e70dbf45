"""Files that are damaged, are something else, or come in several parts."""

import json
import pickle

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.weights.helpers import write
from vir_jax.weights import WeightsError
from vir_jax.weights.files import read_weights, write_weights

TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}


def with_header(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin, end, *, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name], strict=True)


def test_what_is_written_is_read(tmp_path):
    beside = {"config.json": {"x": [1, 2]}, "preprocessor_config.json": {"y": None}}
    write_weights(tmp_path / "new" / "folder", {**TENSORS, "turned": TENSORS["a"].T}, beside)
    tensors, found = read_weights(tmp_path / "new" / "folder")
    same(tensors, {**TENSORS, "turned": TENSORS["a"].T})
    assert found == beside
    same(read_weights(tmp_path / "new" / "folder" / "model.safetensors")[0], tensors)
    # Readers for PyTorch want to be told.
    assert b'"format":"pt"' in (tmp_path / "new" / "folder" / "model.safetensors").read_bytes()[:200]
    with pytest.raises(FileExistsError, match="exists; name another folder"):
        write_weights(tmp_path / "new" / "folder", TENSORS, {})


def test_several_files_with_an_index(tmp_path):
    for i, name in enumerate(TENSORS):
        save_file({name: TENSORS[name]}, tmp_path / f"part{i}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "part0.safetensors", "b": "part1.safetensors"}}))
    same(read_weights(tmp_path)[0], TENSORS)
    same(read_weights(index)[0], TENSORS)
    save_file(TENSORS, tmp_path / "part1.safetensors")
    with pytest.raises(WeightsError, match="holds a, which another file"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../part0.safetensors"}}))
    with pytest.raises(WeightsError, match="names files of other folders"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="gone"):
        read_weights(tmp_path)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_all_floats_become_float32(tmp_path, dtype):
    tensors = {name: x.astype(dtype) for name, x in TENSORS.items()}
    same(read_weights(write(tmp_path / "x", tensors))[0], TENSORS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged"),
        (b"\x10\x00", "damaged"),
        (with_header({"a": entry(0, 8, shape=[2])}, b"\0" * 7), "damaged"),  # cut off
        (with_header({"a": entry(0, 8, shape=[2])}, b"\0" * 9), "damaged"),  # something behind
        (with_header({"a": entry(0, 8, shape=[3])}, b"\0" * 8), "damaged"),  # shape and size differ
        (with_header({"a": entry(0, 8, shape=[2]), "b": entry(4, 12, shape=[2])}, b"\0" * 12), "damaged"),
        (with_header({"a": entry(0, 8, shape=[2]), "b": entry(12, 20, shape=[2])}, b"\0" * 20), "damaged"),
        (with_header({"a": entry(0, 2**63, shape=[2**61])}, b"\0" * 8), "damaged"),
        (with_header({"a": entry(0, 8, shape=[2], dtype="object")}, b"\0" * 8), "damaged"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged"),
        ((10).to_bytes(8, "little") + b"no json!!!", "damaged"),
        (pickle.dumps({"a": [1.0] * 10}), "damaged"),
        (
            with_header({"a": entry(0, 16, shape=[2], dtype="I64")}, b"\0" * 16),
            "a is I64; expected one of F64",
        ),
        (with_header({}, b""), "holds no tensor"),
    ],
)
def test_damaged_files_are_one_error(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        read_weights(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name in ("model.bin", "model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(WeightsError, match=r"can run code and is not read|damaged"):
            read_weights(tmp_path / name)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_weights(tmp_path / "gone")
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor .* there are x.bin"):
        read_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="is no JSON"):
        read_weights(write(tmp_path, TENSORS))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(WeightsError, match="holds list; expected an object"):
        read_weights(tmp_path)
