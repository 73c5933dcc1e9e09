"""What predicts run time: flops, parameters or activations ("Fast and Accurate Model
Scaling", CVPR 2021, arXiv 2103.06877, section 3, figure 3).

Networks scaled by several kinds and factors are timed on this computer's processor and
simulated on an accelerator; a line is fitted through each count and each time. The paper
found activations to predict best on its GPUs; here the figures say what they say.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..accel import Hardware, presets, simulate
from ..figure import blank, save
from ..models import trace
from ..models.costs.run_profile import set_threads, timed
from ..models.scaling import BASES, Config, Counts, LineFit, build, counts, fit_line, scale

COUNTS = ("flops", "params", "activations")
TIMES = ("measured", "simulated")
DEFAULT_BASES = ("efficientnet_b0", "regnety_004", "regnetz_005")
DEFAULT_KINDS = ("d", "wg", "r", "dwgr", "fast")
DEFAULT_FACTORS = (2.0, 4.0)


@dataclass(frozen=True)
class TimedNetwork:
    """One scaled network: its counts for one image, and seconds a batch.

    ``times`` are one of each round on this computer; ``seconds`` is the fastest, which other
    work on the machine disturbs least. ``simulated_seconds`` is what the simulated machine
    takes for the whole network.
    """

    base: str
    kind: str
    factor: float
    image_size: int
    counts: Counts
    times: tuple[float, ...]
    simulated_seconds: float

    @property
    def seconds(self) -> float:
        return min(self.times)


@dataclass(frozen=True)
class RuntimeStudy:
    """The networks that were timed, of ``planned`` ones; the rest ran out of time."""

    networks: tuple[TimedNetwork, ...]
    planned: int
    batch: int
    threads: int
    repeats: int
    simulator: str
    hardware: str
    seed: int

    @property
    def rounds(self) -> int:
        """Times of every network; fewer than ``repeats`` where time ran out."""
        return min(len(network.times) for network in self.networks)

    def fits(self, base: str | None = None) -> dict[str, dict[str, LineFit]]:
        """``TIMES`` -> ``COUNTS`` -> line and Pearson's r, over all networks or one base's."""
        chosen = [network for network in self.networks if base in (None, network.base)]
        times = {
            "measured": [network.seconds for network in chosen],
            "simulated": [network.simulated_seconds for network in chosen],
        }
        return {
            name: {
                count: fit_line([getattr(n.counts, count) for n in chosen], seconds)
                for count in COUNTS
            }
            for name, seconds in times.items()
        }

    @property
    def bases(self) -> tuple[str, ...]:
        """Bases of which enough was timed for a line."""
        timed_bases = [network.base for network in self.networks]
        return tuple(b for b in dict.fromkeys(timed_bases) if timed_bases.count(b) > 2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = asdict(self) | {"rounds": self.rounds}
        plain["fits"] = {"all": _plain(self.fits())} | {b: _plain(self.fits(b)) for b in self.bases}
        return plain


def _plain(fits: dict[str, dict[str, LineFit]]) -> dict[str, Any]:
    return {name: {c: asdict(line) for c, line in lines.items()} for name, lines in fits.items()}


def runtime_study(
    bases: Sequence[str] = DEFAULT_BASES,
    kinds: Sequence[str] = DEFAULT_KINDS,
    factors: Sequence[float] = DEFAULT_FACTORS,
    *,
    batch: int = 1,
    threads: int | None = None,
    repeats: int = 5,
    seconds: float = 150.0,
    simulator: str = "vitcod",
    hardware: Hardware = presets["vitcod"],
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> RuntimeStudy:
    """Time and simulate ``bases`` (of `sievit.models.scaling.BASES`) and what they scale to.

    kinds, factors  as of `sievit.models.scale`; every base also as it is
    repeats         rounds over all networks, a batch of each a round, so that what else
                    the machine does meets all of them
    seconds         no network is begun after half of it, no batch after all of it; they
                    come in random order by ``seed``, so that what is left out has no pattern

    Random weights, evaluation, batch norms not folded. Raises ValueError for an unknown
    base or kind, and where fewer than three networks could be timed.
    """
    networks = _networks(bases, kinds, factors)
    random.Random(seed).shuffle(networks)
    begin, runs = time.perf_counter(), []
    with set_threads(threads), torch.inference_mode():
        used = torch.get_num_threads()
        for names, config in networks:
            if time.perf_counter() - begin > seconds / 2:
                break
            runs.append(_Run(names, config, batch, simulator, hardware))
            progress(0.5 * len(runs) / len(networks))
        for done in range(repeats):
            for run in runs:
                if done == 0 or time.perf_counter() - begin <= seconds:
                    run.times += timed(run.forward, 1, warm_up=int(done == 0))
            progress(0.5 + 0.5 * (done + 1) / repeats)
    if len(runs) < 3:
        raise ValueError(f"{seconds:g} s were enough for {len(runs)} networks, 3 are needed")
    found = tuple(run.found() for run in runs)
    details = (batch, used, repeats, simulator, hardware.name, seed)
    return RuntimeStudy(found, len(networks), *details)


def _networks(
    bases: Sequence[str], kinds: Sequence[str], factors: Sequence[float]
) -> list[tuple[tuple[str, str, float], Config]]:
    unknown = [base for base in bases if base not in BASES]
    if unknown:
        raise ValueError(f"networks that can be scaled: {', '.join(BASES)}; got {unknown[0]!r}")
    found = {}
    for base in bases:
        found[BASES[base]] = (base, "none", 1.0)
        for kind in kinds:
            for factor in factors:
                found.setdefault(scale(BASES[base], kind, factor), (base, kind, float(factor)))
    return [(names, config) for config, names in found.items()]


class _Run:
    """One network, built, counted and simulated, with the times it has so far."""

    def __init__(
        self,
        names: tuple[str, str, float],
        config: Config,
        batch: int,
        simulator: str,
        hardware: Hardware,
    ) -> None:
        self.names, self.config = names, config
        self.model = build(config).eval()
        workload = trace(self.model, config.image_size)
        self.counts = counts(workload)
        self.simulated = simulate(workload, hardware, simulator, batch).seconds
        self.images = torch.randn(batch, 3, config.image_size, config.image_size)
        self.times: list[float] = []

    def forward(self) -> torch.Tensor:
        return self.model(self.images)

    def found(self) -> TimedNetwork:
        size = self.config.image_size
        return TimedNetwork(*self.names, size, self.counts, tuple(self.times), self.simulated)


COLOURS = ("#2b6cb0", "#dd6b20", "#38a169", "#d53f8c", "#718096", "#ecc94b")


def plot_runtime(study: RuntimeStudy, path: str | os.PathLike[str]) -> None:
    """Every network as a dot: each count against each time, with its line and r; a PNG."""
    figure = blank(10, 6, dpi=120)
    panels = figure.subplots(len(TIMES), len(COUNTS), sharey="row", sharex="col")
    fits = study.fits()
    for row, name in zip(panels, TIMES, strict=True):
        row[0].set_ylabel(f"{name} ms a batch of {study.batch}")
        for panel, count in zip(row, COUNTS, strict=True):
            _scatter(panel, study, name, count, fits[name][count])
    for panel, count in zip(panels[-1], COUNTS, strict=True):
        panel.set_xlabel(f"{count} (1e6)")
    panels[0, 0].legend(frameon=False, fontsize=8)
    save(figure, path)


def _scatter(panel: Any, study: RuntimeStudy, name: str, count: str, line: LineFit) -> None:
    bases = dict.fromkeys(network.base for network in study.networks)
    for base, colour in zip(bases, COLOURS * len(bases), strict=False):
        own = [n for n in study.networks if n.base == base]
        x = [getattr(n.counts, count) / 1e6 for n in own]
        y = [1e3 * (n.seconds if name == "measured" else n.simulated_seconds) for n in own]
        panel.plot(x, y, "o", color=colour, ms=4, alpha=0.8, label=base)
    ends = [0.0, max(getattr(n.counts, count) for n in study.networks)]
    values = [1e3 * (line.intercept + line.slope * x) for x in ends]
    panel.plot([x / 1e6 for x in ends], values, color="#1a202c", lw=0.8)
    panel.set_title(f"r = {line.r:.3f}", fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
