"""Cuts the data shipped here out of the whole data of the published systems.

    python tests/data/make_data.py SOURCE [--out tests/data]

README.md beside this file says where SOURCE comes from and what is cut. The same source gives
the same arrays; ``tests/test_data.py`` compares them where the source is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from sievit.models.families.internimage import BlockStyle, InternImage
from sievit.workload import AttentionMask

Arrays = dict[str, np.ndarray]

COPIED = (
    "vitcod-deit-tiny-masks/LICENSE",
    "vitcod-deit-tiny-masks/NOTICE.txt",
    "vitcod-deit-tiny-masks/global_token_info_0.95.npy",
    "measured-baselines/jetson_tx2_tensorrt_vit_tiny_196.csv",
    "measured-baselines/rtx2080ti_fp32_vit_tiny_196.csv",
    "golden/fast_scaling.json",
)
"""Small files, shipped as they are."""

MASK = "vitcod-deit-tiny-masks/info_0.95.npy"
BLOCK = "levels.1.blocks.0"


def whole_case(case: str) -> Callable[[Mapping], Arrays]:
    """A case as it is."""
    return lambda data: {key: data[key] for key in data if key.startswith(case + "/")}


def first_image(case: str, *whole: str) -> Callable[[Mapping], Arrays]:
    """A case with the first image alone of every array but the state and those named."""

    def cut(data: Mapping) -> Arrays:
        made = whole_case(case)(data)
        for key, array in made.items():
            name = key.removeprefix(case + "/")
            if not name.startswith("sd/") and name not in whole:
                made[key] = array[:1]
        return made

    return cut


def first_head(data: Mapping) -> Arrays:
    """The averaged maps, masks and counts of the first head of every layer."""
    names = ("avg_attention", "mask_cut0.5", "kept_per_key_cut0.5")
    return {name: data[name][:, :1] for name in names}


def one_block(case: str, style: BlockStyle) -> Callable[[Mapping], Arrays]:
    """One block of a network too large to ship: its weights, what goes in and what comes out.

    The two maps are recorded here, in a forward whose answer must be the published one.
    """

    def cut(data: Mapping) -> Arrays:
        arrays = {k.removeprefix(case + "/"): torch.tensor(data[k]) for k in data}
        state = {k.removeprefix("sd/"): v for k, v in arrays.items() if k.startswith("sd/")}
        model = InternImage(16, (1, 1, 2, 1), style, num_classes=10).double().eval()
        model.load_state_dict(state)
        maps: dict[str, torch.Tensor] = {}
        block = model.get_submodule(BLOCK)
        block.register_forward_hook(lambda _, given, out: maps.update(x=given[0], y=out))
        with torch.no_grad():
            error = (model(arrays["x"]) - arrays["y"]).abs().max() / arrays["y"].abs().max()
        if error > 1e-5:
            raise ValueError(f"{case} is off by {error:.1e} from its published answer")
        made = {f"{case}/{name}": value.contiguous().numpy() for name, value in maps.items()}
        for name, value in state.items():
            if name.startswith(BLOCK + "."):
                made[f"{case}/sd/{name.removeprefix(BLOCK + '.')}"] = value.numpy()
        return made | {f"{case}/part": np.array(BLOCK)}

    return cut


CUTS: dict[str, tuple[Callable[[Mapping], Arrays], ...]] = {
    "dcn_core": (first_image("c_removecenter", "params", "offset_scale"), whole_case("d_stride2")),
    "dcnv3_module": (whole_case("cfs_dw5"),),
    "dcnv4_module": (whole_case("cfs"),),
    "efficientvit_modules": (
        first_image("cga_m0_stage1"),
        whole_case("lwa_10_w7_pad"),
        whole_case("ffn_64"),
    ),
    "vitcod_algorithm": (
        first_head,
        first_image("attn_h4_plain", "recon_loss"),
        whole_case("attn_h4_ae"),
    ),
    "internimage_mini": (one_block("mini_prenorm_T", BlockStyle()),),
    "flashinternimage_mini": (one_block("mini_T", BlockStyle("dcnv4", bias=False)),),
}
"""File of golden vectors -> what is kept of it."""


def make(source: Path, out: Path) -> None:
    """Write everything that is shipped into ``out``."""
    for name in (*COPIED, MASK):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(source / name, out / name)
    AttentionMask.load(source / MASK).save((out / MASK).with_suffix(".npz"))
    (out / "golden").mkdir(exist_ok=True)
    for name, cuts in CUTS.items():
        with np.load(source / "golden" / f"{name}.npz") as data:
            kept = {key: array for cut in cuts for key, array in cut(data).items()}
        np.savez_compressed(out / "golden" / f"{name}.npz", **kept)
    shapes = json.loads((source / "golden/efficientvit_state_shapes.json").read_text())
    text = json.dumps({"M0": shapes["M0"]}, separators=(",", ":"))
    (out / "golden/efficientvit_state_shapes.json").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    make(given.source, given.out)
