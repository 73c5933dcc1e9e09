"""Many machines, many workloads: each pair simulated once, over processes.

`explore` runs every workload on every configuration. Results go to a file as they come,
one line each under a digest of everything they depend on (operations and masks, hardware,
schedule, simulator with its parameters, batch, profile, this package's code), so that a run
that was interrupted, or is widened later, computes only what is missing. A configuration that
fails is a result too.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Executor, as_completed
from contextlib import closing, nullcontext
from dataclasses import asdict, fields, replace
from typing import Any, NamedTuple

import numpy as np

from ...checks import integer
from ...workload import Attention, Workload, polarize_head
from ..hardware import Hardware, apart, as_dict, presets
from ..report.energy import PROFILES, EnergyProfile, area, energy
from ..schedule import DEFAULT, Schedule
from ..simulate import check_batch, simulate_silently
from ..simulators.registry import simulator_named
from .fingerprint import code_fingerprint, fingerprint
from .grid import Changes, Configuration, configured
from .points import DesignPoint, Exploration
from .processes import WorkerDied, run_in_processes
from .results_file import Journal

CHUNK_SCORES = 1_000_000
"""Attention scores that a task computes, about: half a second of simulation."""

Progress = Callable[[DesignPoint, int, int], None]
"""Called with (point, points done, all points), in the order in which they end."""


def explore(
    workloads: Mapping[str, Workload],
    hardware: Iterable[Hardware | Configuration | Changes],
    executor: Executor | None = None,
    results: str | os.PathLike[str] | None = None,
    *,
    simulator: str = "vitcod",
    batch: int = 1,
    profile: EnergyProfile | str = "aladdin-28nm",
    base: Hardware = presets["vitcod"],
    schedule: Schedule = DEFAULT,
    parameters: Any = None,
    jobs: int | None = None,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    progress: Progress = lambda point, done, total: None,
) -> Exploration:
    """Simulate every workload on every machine.

    hardware  machines, or changes to ``base``, ``schedule`` and ``parameters`` by the names
              of their fields (see `grid`)
    executor  where to run; it stays open. None: ``jobs`` processes of our own (None: one a
              core; 1: this process)
    results   file (JSON lines) that results are written to, and taken from where they are
              there already
    labels    of a workload: what it varies (sparsity, latent heads, ...), for tables

    One configuration that fails, or whose process dies, does not stop the rest. Raises
    ValueError for an unknown simulator or profile, a batch or jobs below 1, and a results
    file that is in use or holds something else; RuntimeError where ``executor`` breaks
    (what was done is in ``results``).
    """
    settings = _settings(simulator, batch, profile)
    own = simulator_named(simulator).checked(parameters)
    start = Configuration(*apart(base, schedule), {simulator: own})
    jobs = None if jobs is None else integer("jobs", jobs)
    plan = _Plan(workloads, hardware, start, settings, labels or {})
    with nullcontext() if results is None else Journal(results) as journal:
        known = {} if journal is None else journal.known
        _warn_of_other_code(known, results)
        reused = plan.take(known, progress)
        chunks = plan.chunks(jobs or os.cpu_count() or 1)
        with closing(_outcomes(chunks, executor, jobs)) as outcomes:
            for request, outcome in outcomes:
                if journal is not None:
                    journal.append(_record(request, outcome, settings))
                plan.put(request, outcome, progress)
    return Exploration(plan.points, reused)


def _warn_of_other_code(known: Mapping[str, Mapping[str, Any]], results: Any) -> None:
    others = sum(record["code"] != code_fingerprint() for record in known.values())
    if others:
        warnings.warn(
            f"{others} of {len(known)} results in {results} come from another version of this "
            "package: they stay there and are not used",
            stacklevel=3,
        )


class _Settings(NamedTuple):
    """What all points of an exploration share."""

    simulator: str
    batch: int
    profile: EnergyProfile


class _Request(NamedTuple):
    """One simulation, and the digest of all that it depends on."""

    key: str
    name: str
    workload: Workload
    machine: Configuration


class _Outcome(NamedTuple):
    """Figures or an error; ``final``: the same would come out again."""

    figures: Mapping[str, Any]
    error: str | None
    final: bool = True


class _Chunk(NamedTuple):
    """What a worker gets: machines for one workload, which is sent once."""

    settings: _Settings
    name: str
    workload: Workload
    machines: tuple[tuple[str, Configuration], ...]

    def requests(self) -> Iterator[_Request]:
        for key, machine in self.machines:
            yield _Request(key, self.name, self.workload, machine)

    def single(self) -> tuple[_Chunk, ...]:
        """Chunks of one machine each."""
        return tuple(self._replace(machines=(one,)) for one in self.machines)


def _settings(simulator: str, batch: int, profile: EnergyProfile | str) -> _Settings:
    simulator_named(simulator)
    batch = check_batch(batch)
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
        profile = PROFILES[profile]
    return _Settings(simulator, batch, profile)


class _Plan:
    """The points that were asked for, in order; equal ones share one request."""

    def __init__(
        self,
        workloads: Mapping[str, Workload],
        hardware: Iterable[Hardware | Configuration | Changes],
        base: Configuration,
        settings: _Settings,
        labels: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.settings = settings
        self._asked: list[DesignPoint] = []
        self._missing: dict[str, _Request] = {}
        self._places: dict[str, list[int]] = {}
        self._finished = 0
        machines = [_machine(base, entry, settings.simulator) for entry in hardware]
        about = (
            settings.simulator,
            settings.batch,
            fingerprint(settings.profile),
            code_fingerprint(),
        )
        for name, workload in workloads.items():
            depends = (*about, fingerprint(workload.ops))
            for changes, machine, error in machines:
                varied = {**labels.get(name, {}), **changes}
                self._ask(name, varied, machine, error, workload, depends)

    def _ask(
        self,
        name: str,
        varied: Changes,
        machine: Configuration | None,
        error: Any,
        workload: Workload,
        depends: tuple[Any, ...],
    ) -> None:
        simulator, batch, profile = self.settings
        point = DesignPoint(name, varied, None, simulator, batch, profile.name, {}, error)
        if machine is not None:
            own = machine.parameters.get(simulator)
            point = replace(
                point, hardware=machine.hardware, schedule=machine.schedule, parameters=own
            )
        self._asked.append(point)
        if machine is not None:
            unnamed = replace(machine.hardware, name="")
            key = fingerprint((depends, unnamed, point.schedule, point.parameters))
            request = _Request(key, name, workload, machine)
            self._missing.setdefault(key, request)
            self._places.setdefault(key, []).append(len(self._asked) - 1)

    @property
    def points(self) -> tuple[DesignPoint, ...]:
        return tuple(self._asked)

    def take(self, known: Mapping[str, Mapping[str, Any]], progress: Progress) -> int:
        """Fill in what needs no simulation; returns how many points were known."""
        for point in self._asked:
            if point.hardware is None:
                self._tell(point, progress)
        before = self._finished
        for request in list(self._missing.values()):
            record = known.get(request.key)
            if record is not None and record["final"]:
                self.put(request, _Outcome(record["figures"], record["error"]), progress)
        return self._finished - before

    def put(self, request: _Request, outcome: _Outcome, progress: Progress) -> None:
        """Fill in the points of a request."""
        del self._missing[request.key]
        for place in self._places[request.key]:
            point = replace(self._asked[place], figures=outcome.figures, error=outcome.error)
            self._asked[place] = point
            self._tell(point, progress)

    def _tell(self, point: DesignPoint, progress: Progress) -> None:
        self._finished += 1
        progress(point, self._finished, len(self._asked))

    def chunks(self, jobs: int) -> list[_Chunk]:
        """The missing requests, those that share a workload and its assignments together."""
        by_workload: dict[int, list[_Request]] = {}
        for request in self._missing.values():
            by_workload.setdefault(id(request.workload), []).append(request)
        made = []
        for requests in by_workload.values():
            requests.sort(key=lambda r: (r.machine.hardware.lines, r.machine.schedule.assignment))
            scores = max(_scores(requests[0].workload) * self.settings.batch, 1)
            size = min(CHUNK_SCORES // scores, -(-len(requests) // (4 * jobs)))
            for start in range(0, len(requests), max(size, 1)):
                part = requests[start : start + max(size, 1)]
                machines = tuple((request.key, request.machine) for request in part)
                made.append(_Chunk(self.settings, part[0].name, part[0].workload, machines))
        return made


def _machine(
    base: Configuration, entry: Hardware | Configuration | Changes, simulator: str
) -> tuple[Changes, Configuration | None, Any]:
    """(what differs from ``base``, the machine or None, the error or None)."""
    if isinstance(entry, Hardware):
        entry = Configuration(*apart(entry, base.schedule), base.parameters)
    if isinstance(entry, Configuration):
        made = entry._replace(parameters={**base.parameters, **entry.parameters})
        before = _named(base, simulator)
        return {k: v for k, v in _named(made, simulator).items() if v != before[k]}, made, None
    try:
        made = configured(base.hardware, entry, base.schedule, base.parameters)
        others = [name for name in made.parameters if name != simulator]
        if others:
            raise ValueError(f"parameters of {', '.join(others)} are set, {simulator} is run")
        return dict(entry), made, None
    except ValueError as error:
        return dict(entry), None, str(error)


def _named(machine: Configuration, simulator: str) -> dict[str, Any]:
    """Every field of a configuration by the name that sets it."""
    own = machine.parameters[simulator]
    made = {item.name: getattr(machine.hardware, item.name) for item in fields(Hardware)}
    made |= {item.name: getattr(machine.schedule, item.name) for item in fields(Schedule)}
    return made | {f"{simulator}.{item.name}": getattr(own, item.name) for item in fields(own)}


def _scores(workload: Workload) -> int:
    """Attention scores that a machine computes for one image."""
    return sum(
        op.windows
        * (sum(mask.computed for mask in op.masks) if op.masks else op.heads * op.queries * op.keys)
        for op in workload.attention
    )


def _record(request: _Request, outcome: _Outcome, settings: _Settings) -> dict[str, Any]:
    """A line of the results file."""
    return {
        "key": request.key,
        "workload": request.name,
        "hardware": as_dict(request.machine.hardware, request.machine.schedule),
        "schedule": asdict(request.machine.schedule),
        "parameters": asdict(request.machine.parameters[settings.simulator]),
        "simulator": settings.simulator,
        "batch": settings.batch,
        "profile": settings.profile.name,
        "code": code_fingerprint(),
        **outcome._asdict(),
    }


def _outcomes(
    chunks: list[_Chunk], executor: Executor | None, jobs: int | None
) -> Generator[tuple[_Request, _Outcome], None, None]:
    """Every request of ``chunks`` with what came of it, as they end."""
    if executor is not None:
        yield from _submitted(chunks, executor)
    elif jobs == 1 or (jobs is None and len(chunks) < 2):
        for single in itertools.chain.from_iterable(chunk.single() for chunk in chunks):
            yield from zip(single.requests(), _simulated(single), strict=True)
    elif chunks:
        _compile()
        for chunk, made in run_in_processes(
            _simulated, chunks, jobs or os.cpu_count() or 1, _Chunk.single
        ):
            died = isinstance(made, WorkerDied)
            outcomes = [_Outcome({}, str(made), final=False)] if died else made
            yield from zip(chunk.requests(), outcomes, strict=True)


def _submitted(chunks: list[_Chunk], executor: Executor) -> Iterator[tuple[_Request, _Outcome]]:
    waiting = {executor.submit(_simulated, chunk): chunk for chunk in chunks}
    try:
        for future in as_completed(waiting):
            try:
                yield from zip(waiting[future].requests(), future.result(), strict=True)
            except BrokenExecutor as error:
                raise RuntimeError(
                    f"the executor broke ({error}); what was done is in the results file"
                ) from error
    finally:
        for future in waiting:
            future.cancel()


def _simulated(chunk: _Chunk) -> list[_Outcome]:
    """Run in a worker: the figures, or the error, of each machine of the chunk."""
    return [_outcome(chunk.workload, machine, chunk.settings) for _, machine in chunk.machines]


def _outcome(workload: Workload, machine: Configuration, settings: _Settings) -> _Outcome:
    try:
        return _Outcome(_figures(workload, machine, settings), None)
    except ValueError as error:
        return _Outcome({}, str(error))
    except Exception as error:
        return _Outcome({}, f"{type(error).__name__}: {error}", final=False)


def _figures(workload: Workload, machine: Configuration, settings: _Settings) -> dict[str, Any]:
    simulator, batch, profile = settings
    hardware, schedule, own = machine
    report = simulate_silently(
        workload, hardware, simulator, batch, schedule=schedule, parameters=own.get(simulator)
    )
    spent, size = energy(report, profile), area(hardware, profile)
    counted = all(op.macs or op.traffic or not op.cycles for op in report.ops)
    figures: dict[str, Any] = {}
    for before, only in (("", False), ("attention_", True)):
        cycles = report.attention_cycles if only else report.cycles
        figures |= {
            f"{before}cycles": cycles,
            f"{before}seconds": hardware.seconds(cycles),
            f"{before}energy_pj": spent.total_pj(only) if counted else None,
            f"{before}dram_bytes": report.dram_bytes(only) if counted else None,
        }
    return figures | {
        "macs": report.macs if counted else None,
        "utilization": report.utilization() if counted else None,
        "bottleneck": report.bottleneck(),
        "area_mm2": None if profile.mac_area_um2 is None else size.total_mm2,
        "sram_bytes": hardware.sram_bytes,
    }


def _compile() -> None:
    """Compile here, once and announced, before workers each find the cache empty."""
    mask = polarize_head(np.eye(4, dtype=bool), 1)
    simulate_silently(Workload("tiny", (Attention("tiny", 1, 4, 4, 8, 8, masks=(mask,)),)))
