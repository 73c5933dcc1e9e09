"""How much attention should a small ViT have? Networks of equal latency, 0 to 50 % of it.

    python examples/studies/attention_share.py --out attention_share.json
    python examples/studies/attention_share.py --data DATA --epochs 12 --out attention_share.json

The first part shrinks DeiT-Tiny to be 1.25 and 1.5 times as fast, with each share of
attention among its 24 layers, and measures what is memory-bound. With DATA (train/CLASS,
test/CLASS) a second part trains small networks of equal latency from scratch on it, which
says little: few photos, few epochs. What OUT holds already is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sievit.figure import blank
from sievit.figure import save as save_figure
from sievit.files import write_json
from sievit.images import center_crops, load_folder, normalize
from sievit.models import complexity
from sievit.models.costs.run_profile import profile_run, relative_time, set_threads
from sievit.models.families.mixed import MixedViT, spread, width_at
from sievit.provenance import versions

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SPEEDUPS = (1.25, 1.5)
DEIT = {"image_size": 224, "patch_size": 16, "dim": 192, "heads": 3}
SMALL = {"image_size": 64, "patch_size": 8, "dim": 96, "heads": 3, "mean": True}
BATCH, PAIRS, SEEDS = 4, 15, (0, 1)


def slower(model, base, size: int) -> float:
    """Run time over the base's, the two taking turns: much else may run on the computer."""
    images = torch.randn(BATCH, 3, size, size)
    model.eval()
    base.eval()
    with torch.inference_mode():
        return relative_time(lambda: model(images), lambda: base(images), PAIRS)


def subnetwork(share: float, layers: int, base, target: float, settings: dict, **more):
    """The network with that share of attention that takes ``target`` of the base's time."""
    attention = round(share * layers)
    kinds = spread(attention, layers - attention)
    size = settings["image_size"]

    def build(hidden: int) -> MixedViT:
        return MixedViT(kinds, hidden, **settings, **more)

    start = 2 * settings["dim"]
    hidden = width_at(target, lambda width: slower(build(width), base, size), start)
    model = build(hidden)
    found = {"attention": attention, "mlp": layers - attention, "hidden": hidden}
    return model, found | {"target_time": target, "time": slower(model, base, size)}


def costs(model, settings: dict) -> dict:
    cost = complexity(model, settings["image_size"])
    profile = profile_run(model, settings["image_size"], BATCH, repeats=PAIRS)
    return {
        "macs": cost.macs,
        "params": cost.params,
        "memory_bound_share": profile.memory_bound_share,
        "kinds": {kind: s / profile.profiled_seconds for kind, s in profile.kinds.items()},
    }


def latencies(result: dict, save) -> None:
    base = MixedViT(spread(12, 12), 768, **DEIT)
    result.setdefault("base", costs(base, DEIT))
    for speedup in SPEEDUPS:
        for share in SHARES:
            key = f"{speedup}x, {share:.0%}"
            if key in result:
                continue
            model, found = subnetwork(share, 24, base, 1 / speedup, DEIT)
            result[key] = found | costs(model, DEIT)
            print(key, result[key], flush=True)
            save()


def crops_of(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    photos = load_folder(folder)
    classes = [Path(name).parts[0] for name in photos.names]
    labels = torch.tensor([sorted(set(classes)).index(name) for name in classes])
    return normalize(center_crops(photos, SMALL["image_size"])), labels


def trained(model, train, test, epochs: int, seed: int) -> float:
    """Test accuracy after AdamW with a cosine rate; crops are mirrored and shifted."""
    images, labels = train
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(images) // 32)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(32):
            batch = images[chosen]
            if torch.rand((), generator=order) < 0.5:
                batch = batch.flip(-1)
            shift = torch.randint(-6, 7, (2,), generator=order).tolist()
            loss = F.cross_entropy(model(batch.roll(shift, (2, 3))), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    with torch.no_grad():
        return float((model.eval()(test[0]).argmax(1) == test[1]).float().mean())


def accuracies(result: dict, data: Path, epochs: int, save) -> None:
    train, test = crops_of(data / "train"), crops_of(data / "test")
    classes = int(train[1].max()) + 1
    base = MixedViT(spread(6, 6), 384, **SMALL, num_classes=classes)
    keys = {share: f"trained, {share:.0%}" for share in SHARES}
    for share, key in keys.items():  # all widths first: what trains later may share the machine
        if key not in result:
            torch.manual_seed(0)
            _, result[key] = subnetwork(share, 12, base, 1 / 1.25, SMALL, num_classes=classes)
            save()
    for key in keys.values():
        row = result[key]
        if "accuracy" in row:
            continue
        kinds, found = spread(row["attention"], row["mlp"]), []
        for seed in SEEDS:
            torch.manual_seed(seed)
            fresh = MixedViT(kinds, row["hidden"], **SMALL, num_classes=classes)
            found.append(trained(fresh, train, test, epochs, seed))
        row |= {"accuracy": found, "epochs": epochs}
        row |= {"photos": len(train[0]), "judged": len(test[0])}
        print(key, row, flush=True)
        save()


def plot(result: dict, path: Path) -> None:
    figure = blank(9, 3.4, dpi=120)
    left, right = figure.subplots(1, 2)
    share = 100 * np.array(SHARES)
    for speedup, colour in zip(SPEEDUPS, ("#2b6cb0", "#dd6b20"), strict=True):
        rows = [result[f"{speedup}x, {s:.0%}"] for s in SHARES]
        bound = [100 * row["memory_bound_share"] for row in rows]
        left.plot(share, bound, "o-", color=colour, label=f"{speedup}x as fast as DeiT-Tiny")
    own = 100 * result["base"]["memory_bound_share"]
    left.axhline(own, color="#718096", lw=0.8, label="DeiT-Tiny itself")
    left.set_ylabel("memory-bound share of run time, %")
    left.legend(frameon=False, fontsize=8)
    keys = [s for s in SHARES if f"trained, {s:.0%}" in result]
    for s in keys:
        found = [100 * a for a in result[f"trained, {s:.0%}"]["accuracy"]]
        right.plot([100 * s] * len(found), found, "o", color="#2b6cb0")
    right.set_ylabel("accuracy of small networks, %\n(few photos, few epochs)")
    for panel in (left, right):
        panel.set_xlabel("attention layers, % of all layers")
        panel.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="train the small networks on these photos")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("attention_share.json"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    out: Path = arguments.out
    result: dict = json.loads(out.read_text()) if out.exists() else {}

    def save() -> None:
        about = {"versions": versions(), "threads": arguments.threads, "batch": BATCH}
        write_json(result | about | {"seeds": SEEDS}, out)

    with set_threads(arguments.threads):
        latencies(result, save)
        if arguments.data is not None:
            accuracies(result, arguments.data, arguments.epochs, save)
    if arguments.plot is not None:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
