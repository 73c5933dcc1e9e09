"""Which parameters an operation reads, each counted once, where it is first used.

A parameter is followed through views and through plain movement of data (gathering a bias
table, joining two tokens) until an operation computes with it: that one is charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


def distinct_elements(tensor: Tensor) -> int:
    """Elements in memory: an expanded axis counts once."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride or not size else 1 for size, stride in pairs)


class ParameterUse:
    """What of each parameter is still to be charged, and which tensors carry it."""

    def __init__(self, model: nn.Module) -> None:
        self.uncharged = {name: p.numel() for name, p in model.named_parameters()}
        self._carried: MutableMapping[Tensor, dict[str, int]] = WeakTensorKeyDictionary()

    def start(self, state: Mapping[str, Tensor]) -> None:
        """Follow the parameters among ``state``'s tensors from here on."""
        for name in self.uncharged:
            self._carried[state[name]] = {name: self.uncharged[name]}
        self._state = state

    def inside(self, module: str) -> list[Tensor]:
        """The parameters of a submodule, by its qualified name."""
        prefix = f"{module}." if module else ""
        return [self._state[name] for name in self.uncharged if name.startswith(prefix)]

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` holds nothing but parameters."""
        return tensor in self._carried

    def pass_on(self, sources: Iterable[Tensor], result: Tensor, view: bool = False) -> None:
        """``result`` holds the elements of ``sources``, all of them parameters; a view at
        most as many as it has itself."""
        carried: dict[str, int] = {}
        for tensor in sources:
            for name, elements in self._carried.get(tensor, {}).items():
                carried[name] = max(carried.get(name, 0), elements)
        if view:
            own = distinct_elements(result)
            carried = {name: min(elements, own) for name, elements in carried.items()}
        if carried:
            self._carried[result] = carried

    def whole(self, tensor: Tensor, elements: int) -> bool:
        """Whether ``tensor`` holds just ``elements`` of one parameter, not yet charged."""
        carried = self._carried.get(tensor, {})
        return len(carried) == 1 and all(
            count == elements and self.uncharged[name] >= elements
            for name, count in carried.items()
        )

    def charge(self, tensors: Iterable[Tensor]) -> int:
        """Parameters among ``tensors`` that no operation was charged for yet."""
        charged = 0
        for tensor in tensors:
            carried = self._carried.get(tensor, {})
            for name, elements in carried.items():
                now = min(elements, self.uncharged[name])
                self.uncharged[name] -= now
                charged += now
            if carried:
                self._carried[tensor] = dict.fromkeys(carried, 0)
        return charged
