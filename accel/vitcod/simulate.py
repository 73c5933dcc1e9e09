"""The ViTCoD-style machine: every attention call stepped by the compiled engine, dense
products on the same MAC lines.

ViTCoD, HPCA 2023, section V. What is modelled stands in `engine`, `mapping` and `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...workload import Attention, Conv, Gemm, HeadCodec, Op, Workload
from ..hardware import Hardware
from ..products import op_cost, product_cost
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule
from .mapping import codec_side_bytes
from .program import CODEC, INDEX, STORE, K, Program, Q, V
from .registers import COUNTS
from .run import AttentionRun, head_costs, run_attention

CHANNELS = {Q: "Q", K: "K", V: "V", INDEX: "index", CODEC: "codec weights", STORE: "output"}


def operations(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int
) -> Iterator[tuple[OpCost, AttentionRun | None]]:
    """The operations of ``workload`` in order, attention with the run behind its cost."""
    repeated: dict[Attention, tuple[OpCost, AttentionRun]] = {}
    plain: dict[tuple, OpCost | None] = {}  # layers repeat: each product is charged once
    encoders = encoded_products(workload.ops)
    for index, op in enumerate(workload.ops):
        if isinstance(op, Attention):
            key = replace(op, name="")
            made = repeated.get(key) if op.masks is None else None
            if made is None:
                run = run_attention(op, hardware, batch, schedule)
                made = cost_of(run, batch), run
            if op.masks is None:  # equal dense layers take equal time
                repeated[key] = made
            yield replace(made[0], name=op.name), made[1]
            continue
        encoded = encoders.get(index)
        if encoded is not None and isinstance(op, (Gemm, Conv)):
            yield _projection_cost(op, encoded, hardware, schedule, batch), None
            continue
        alike = (type(op), *(value for key, value in vars(op).items() if key != "name"))
        if alike not in plain:
            plain[alike] = op_cost(op, hardware, batch, schedule)
        cost = plain[alike]
        if cost is not None:
            yield replace(cost, name=op.name), None


@dataclass(frozen=True)
class _Encoded:
    """What the encoder does behind one product: the sides it makes are Q, K or both."""

    attention: Attention
    codec: HeadCodec
    sides: str

    @property
    def vectors(self) -> int:
        """Tokens of a head that are encoded, for one image."""
        op = self.attention
        return op.windows * sum({"q": op.queries, "k": op.keys}[side] for side in self.sides)


def encoded_products(ops: Sequence[Op]) -> dict[int, _Encoded]:
    """The products that make the Q and K of each attention with a codec, by their place.

    They are the last before it, after any attention before: one for Q, K and V together, or
    several whose sizes are those of Q, K and V or of two of them. Equal sizes are taken in
    the order Q, K, V, a pair for K and V. Else one of the size of all three makes both, or
    the last product.
    """
    found: dict[int, _Encoded] = {}
    since: list[int] = []
    for index, op in enumerate(ops):
        if isinstance(op, (Gemm, Conv)):
            since.append(index)
        elif isinstance(op, Attention):
            if op.codec is not None and since:
                sizes = [ops[place].elements_written for place in since]
                for place, sides in _sides(op, sizes).items():
                    found[since[place]] = _Encoded(op, op.codec, sides)
            since = []
    return found


def _sides(op: Attention, sizes: Sequence[int]) -> dict[int, str]:
    """Which of Q and K each of the last products makes, by its place in ``sizes``."""
    of = {
        "q": op.windows * op.heads * op.queries * op.key_dim,
        "k": op.windows * op.heads * op.keys * op.key_dim,
        "v": op.windows * op.heads * op.keys * op.value_dim,
    }
    for count in range(1, min(len(sizes), 3) + 1):
        if sum(sizes[-count:]) == sum(of.values()):
            made, missing = {}, "qkv"
            for place in range(len(sizes) - count, len(sizes)):
                fits = (p for p in PARTS if set(p) <= set(missing) and sizes[place] == _sum(of, p))
                part = next(fits, "")
                missing = "".join(side for side in missing if side not in part)
                made[place] = part.replace("v", "")
            if not missing:
                return {place: sides for place, sides in made.items() if sides}
    whole = [place for place, size in enumerate(sizes) if size == sum(of.values())]
    return {(whole or [len(sizes) - 1])[-1]: "qk"}


PARTS = ("qkv", "kv", "qk", "qv", "q", "k", "v")
"""Of Q, K and V, what one product may make."""


def _sum(sizes: dict[str, int], part: str) -> int:
    return sum(sizes[side] for side in part)


def _projection_cost(
    op: Gemm | Conv, encoded: _Encoded, hardware: Hardware, schedule: Schedule, batch: int
) -> OpCost:
    """A Q or K projection with the encoder behind it: Q and K leave the chip compressed."""
    attention, codec = encoded.attention, encoded.codec
    vectors = encoded.vectors * batch
    saved = vectors * attention.key_dim * (codec.heads - codec.latent_heads)
    macs = codec.macs(vectors, attention.key_dim)
    cycles = -(-macs // hardware.encoder_macs)
    saved = min(saved, op.elements_written * batch)
    cost = product_cost(op, hardware, batch, saved, cycles, schedule=schedule)
    weights = len(encoded.sides) * codec_side_bytes(attention, hardware, decoder=False)
    loaded = (
        Traffic("codec weights", "dram", weights, 0),
        Traffic("codec weights", "buffer", weights, weights),
    )
    every, traffic = cost.macs + macs, (*cost.traffic, *loaded)
    return replace(cost, macs=every, kept_macs=every, codec_macs=macs, traffic=traffic)


def attention_cost(
    op: Attention, hardware: Hardware, batch: int = 1, schedule: Schedule = DEFAULT
) -> OpCost:
    """One attention call, all its windows and images, stepped cycle by cycle."""
    return cost_of(run_attention(op, hardware, batch, schedule), batch)


def cost_of(run: AttentionRun, batch: int) -> OpCost:
    """The cost of a call that was stepped for ``batch`` images."""
    op, hardware, mapping, counts = run.op, run.hardware, run.mapping, run.counts
    got = dict(zip(COUNTS, (int(x) for x in run.trace.counts), strict=True))
    stalls = run.stalls()
    rate = hardware.dram_bytes_per_cycle
    computed = counts.scores * (op.key_dim + op.value_dim)
    decoded = got["decoder_macs"]
    kept = op.kept * batch * (op.key_dim + op.value_dim)
    return OpCost(
        op.name,
        "attention",
        got["cycles"],
        run.phases(),
        macs=computed + decoded,
        kept_macs=kept + decoded,
        traffic=_traffic(run, got),
        stalls=stalls,
        busy={
            "MAC lines": stalls.get("busy", 0) // hardware.lines,
            "DRAM": -(-got["dram_units"] // rate.numerator),
            "softmax": got["softmax_cycles"],
            "decoder": -(-decoded // hardware.decoder_macs),
        },
        details={
            "heads_a_pass": mapping.group,
            "queries_a_tile": mapping.query_tile,
            "keys_a_tile": mapping.key_tile,
            "forwarded_queries": got["forwarded"],
            "awaited_queries": got["waited"],
            "scores_computed": counts.scores,
            "scores_kept": op.kept * batch,
            **_memory_details(hardware, got),
        },
        heads=head_costs(run),
        codec_macs=decoded,
    )


def _memory_details(hardware: Hardware, got: dict[str, int]) -> dict[str, int | str]:
    """The model of the DRAM, and what it did beyond moving bytes."""
    details: dict[str, int | str] = {"dram_model": hardware.dram_model}
    if hardware.dram_model == "ddr4":
        names = ("dram_lines", "dram_row_hits", "dram_activates", "dram_refreshes")
        details |= {"dram_map": hardware.dram_map} | {name: got[name] for name in names}
    return details


def _traffic(run: AttentionRun, got: dict[str, int]) -> tuple[Traffic, ...]:
    """Bytes by tensor: DRAM from the transfers, buffers and lines from what was granted."""
    op, hardware, mapping, counts = run.op, run.hardware, run.mapping, run.counts
    moved = _dram_bytes(run.program)
    word = hardware.word_bytes
    weights = mapping.codec_bytes if op.codec else 0
    rows = [
        Traffic(name, "dram", 0, moved[channel])
        if channel == STORE
        else Traffic(name, "dram", weights if channel == CODEC else moved[channel], 0)
        for channel, name in CHANNELS.items()
        if moved[channel] and (channel != CODEC or weights)
    ]
    expand = mapping.group / mapping.latent_heads if op.codec else 1.0
    sides = (("Q", Q, "query"), ("K", K, "key"), ("V", V, "value"))
    for name, channel, side in sides:
        filled = moved[channel] if channel == V else round(moved[channel] * expand)
        rows.append(Traffic(name, "buffer", got[f"{side}_reads"] * word, filled))
        rows.append(Traffic(name, "lines", got[f"{side}_words"] * word, 0))
    if op.codec:
        latents = moved[Q] + moved[K]
        rows.append(Traffic("latent Q and K", "buffer", latents, latents))
        rows.append(Traffic("codec weights", "buffer", weights, weights))
    if op.bias_params:  # each score that is computed reads its own
        added = counts.scores * hardware.score_bytes
        rows.append(Traffic("attention bias", "dram", moved[CODEC] - weights, 0))
        rows.append(Traffic("attention bias", "buffer", added, moved[CODEC] - weights))
    # Scores: written once, read for the maximum and again for the exponential, written as
    # probabilities after the division and read once by SpMM.
    scores = counts.scores * hardware.score_bytes
    sums = got["drained_words"] * hardware.macs_per_line * hardware.accumulator_bytes
    rows += [
        Traffic("index", "buffer", moved[INDEX], moved[INDEX]),  # pointers and bitmaps too
        Traffic("index", "lines", got["index_reads"] * mapping.entry_bytes, 0),
        Traffic("scores", "buffer", 3 * scores, 2 * scores),
        Traffic("scores", "lines", scores, 0),
        Traffic("output", "buffer", sums + moved[STORE], sums),
    ]
    return tuple(rows)


def _dram_bytes(program: Program) -> dict[int, int]:
    return {channel: program.dram_bytes(channel) for channel in CHANNELS}
