"""Files of weights: what is read, under which names, and what is refused."""

from __future__ import annotations

import gc
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sievit.models import create
from sievit.models.weights.weight_files import read_tensors


def test_an_onnx_graph_names_its_anonymous_weights(tmp_path):
    onnx = pytest.importorskip("onnx")
    from onnx import helper, numpy_helper

    weight, position = np.arange(6, dtype=np.float32).reshape(2, 3), np.ones((1, 1, 3), np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_7"], ["y"], name="/layer.0/fc1/MatMul"),
        helper.make_node("Concat", ["onnx::Concat_9", "y"], ["z"], "/embeddings/Concat_6", axis=1),
        helper.make_node("Add", ["z", "layer.0.fc1.bias"], ["w"], name="/layer.0/fc1/Add"),
        helper.make_node("Reshape", ["w", "onnx::Reshape_1"], ["v"], name="/Reshape"),
    ]
    stored = [
        numpy_helper.from_array(weight, "onnx::MatMul_7"),
        numpy_helper.from_array(position, "onnx::Concat_9"),
        numpy_helper.from_array(np.zeros(3, np.float32), "layer.0.fc1.bias"),
        numpy_helper.from_array(np.array([1, -1]), "onnx::Reshape_1"),
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None) for n in "xv"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], stored)
    onnx.save(helper.make_model(graph), tmp_path / "g.onnx")
    tensors = read_tensors(tmp_path / "g.onnx")
    assert set(tensors) == {"layer.0.fc1.weight", "layer.0.fc1.bias", "embeddings.Concat_6"}
    assert torch.equal(tensors["layer.0.fc1.weight"], torch.from_numpy(weight.T))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".npz", ".onnx"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 cut off"])
@pytest.mark.filterwarnings("error::ResourceWarning")
def test_a_corrupt_file_is_one_clear_error(tmp_path, suffix, content):
    if suffix == ".onnx":
        pytest.importorskip("onnx")
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_tensors(path)
    assert "\n" not in str(error.value)
    del error
    gc.collect()  # a file left open is said now


def test_a_truncated_file_is_one_clear_error(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a.weight": torch.ones(30, 20)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_tensors(path)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1), "b": Malicious()}, path)
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_tensors(path)
    path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ValueError, match="no file of plain tensors"):
        read_tensors(path)
    path = tmp_path / "weights.npz"
    np.savez(path, a=np.array([Malicious()], dtype=object))
    with pytest.raises(ValueError, match="not a readable weights file"):
        read_tensors(path)


def test_paths_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*absent\.pth"):
        create("vit_tiny", pretrained=tmp_path / "absent.pth", depth=1)
    with pytest.raises(ValueError, match=r"weights end in .safetensors.* got 'deit.txt'"):
        create("vit_tiny", pretrained="deit.txt", depth=1)
    np.savez(tmp_path / "empty.npz")
    with pytest.raises(ValueError, match="holds no tensors"):
        read_tensors(tmp_path / "empty.npz")
