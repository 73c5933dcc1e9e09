"""Training in several processes, as `torchrun` starts them; with one, nothing happens here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the other processes where `torchrun` started several; leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.getrank() if several() else 0


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
