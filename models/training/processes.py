"""Training in several processes, as `torchrun` starts them; with one, nothing happens here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def own_device(name: str) -> torch.device:
    """The device called ``name``; of several GPUs "cuda" is this process's own.

    Raises RuntimeError for a name that torch does not know.
    """
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Join the other processes where `torchrun` started several; leave them at the end.
    ``device`` is where this process trains."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if several() else 0


def world_size() -> int:
    return dist.get_world_size() if several() else 1


def over_processes(objective: nn.Module) -> nn.Module:
    if not several():
        return objective
    return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)


def exchanged(whole: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients go over the wire with the last micro-batch alone."""
    several = isinstance(whole, nn.parallel.DistributedDataParallel)
    return whole.no_sync() if several and not last else contextlib.nullcontext()


def mean_over_processes(terms: dict[str, float], device: torch.device) -> dict[str, float]:
    if not several():
        return terms
    values = torch.tensor(list(terms.values()), dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return dict(zip(terms, (values / dist.get_world_size()).tolist(), strict=True))


def from_first(value: float, device: torch.device) -> float:
    if not several():
        return value
    shared = torch.tensor([value], dtype=torch.float64, device=device)
    dist.broadcast(shared, 0)
    return float(shared)


def agreed(value: Any) -> Any:
    """The first process's ``value`` (picklable) in every process: what each computes for
    itself may differ in the last bit."""
    if not several():
        return value
    shared = [value]
    dist.broadcast_object_list(shared, 0)
    return shared[0]
