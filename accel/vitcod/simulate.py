"""The ViTCoD-style machine: every attention call stepped by the compiled engine, dense
products on the same MAC lines.

ViTCoD, HPCA 2023, section V. What is modelled stands in `engine`, `mapping` and `products`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ...workload import Attention, Conv, Gemm, Op, Workload
from ..hardware import Hardware
from ..producers import Producer, producers
from ..products import op_cost, product_cost, spare_bytes
from ..report.report import OpCost, Traffic
from ..schedule import DEFAULT, Schedule
from .estimate import kept_bytes
from .mapping import Mapping, codec_side_bytes
from .program import CODEC, INDEX, LATENT, STORE, K, Program, Q, V
from .registers import COUNTS
from .run import AttentionRun, head_costs, run_attention
from .threshold import with_thresholds

CHANNELS = {Q: "Q", K: "K", V: "V", INDEX: "index", CODEC: "codec weights", STORE: "output",
            LATENT: "latent Q and K"}  # fmt: skip


def operations(
    workload: Workload, hardware: Hardware, schedule: Schedule, batch: int
) -> Iterator[tuple[OpCost, AttentionRun | None]]:
    """The operations of ``workload`` in order, attention with the run behind its cost.

    An attention call is mapped when its first product is reached: what stays on chip between
    them is not stored by the one, nor loaded by the other.
    """
    made = producers(workload.ops)
    of_call = {call: tuple(p for p in made if p.attention == call) for call in {p.attention for p in made}}
    calls = _Calls(workload.ops, hardware, schedule, batch)
    plain: dict[tuple, OpCost | None] = {}  # layers repeat: each product is charged once
    by_product = {p.product: p for p in made}
    for index, op in enumerate(workload.ops):
        if isinstance(op, Attention):
            yield calls.of(index, of_call.get(index, ()))
            continue
        producer = by_product.get(index)
        if producer is not None:
            _, run = calls.of(producer.attention, of_call[producer.attention])
            kept = kept_of(run.mapping, producer.sides)
            if kept or run.op.codec:
                yield _projection_cost(op, producer.sides, run, kept, hardware, schedule, batch), None
                continue
        alike = (type(op), *(value for key, value in vars(op).items() if key != "name"))
        if alike not in plain:
            plain[alike] = op_cost(op, hardware, batch, schedule)
        if plain[alike] is not None:
            yield replace(plain[alike], name=op.name), None


class _Calls:
    """The attention calls of a network, each stepped once; equal dense ones together."""

    def __init__(self, ops: Sequence[Op], hardware: Hardware, schedule: Schedule, batch: int) -> None:
        self.ops, self.hardware, self.schedule, self.batch = ops, hardware, schedule, batch
        self.made: dict[int | tuple, tuple[OpCost, AttentionRun]] = {}

    def of(self, index: int, made_by: tuple[Producer, ...]) -> tuple[OpCost, AttentionRun]:
        """The call at ``index``, made by those products."""
        op = with_thresholds(self.ops[index], self.hardware, self.schedule)
        room = self._room(op, made_by)
        key = (replace(op, name=""), room) if op.masks is None else index
        if key not in self.made:
            run = run_attention(op, self.hardware, self.batch, self.schedule, room)
            self.made[key] = cost_of(run, self.batch), run
        cost, run = self.made[key]
        return replace(cost, name=op.name), run

    def _room(self, op: Attention, made_by: tuple[Producer, ...]) -> int:
        """Bytes of Q, K and V that may wait in the scratchpad while their products run."""
        if not made_by or self.schedule.on_chip == "nothing":
            return 0
        products = [self.ops[producer.product] for producer in made_by]
        return min(spare_bytes(p, self.hardware, self.batch, self.schedule) for p in products)


def kept_of(mapping: Mapping, sides: str) -> int:
    """Bytes of ``sides`` of Q, K and V that are on chip when the call begins, as DRAM would
    hold them."""
    return sum(size for side, size in zip("qkv", kept_bytes(mapping), strict=True) if side in sides)


def _projection_cost(
    op: Gemm | Conv,
    sides: str,
    run: AttentionRun,
    kept: int,
    hardware: Hardware,
    schedule: Schedule,
    batch: int,
) -> OpCost:
    """A product of Q, K or V: what stays on chip is not stored, and with a codec the encoder
    behind it lets Q and K leave the chip compressed."""
    attention, codec = run.op, run.op.codec
    coded = "".join(side for side in sides if side in "qk") if codec else ""
    width = hardware.operand_bytes
    saved, macs, cycles, weights = kept // width, 0, 0, 0
    if codec and coded:
        vectors = attention.windows * batch * sum({"q": attention.queries, "k": attention.keys}[side] for side in coded)
        saved += vectors * attention.key_dim * (codec.heads - codec.latent_heads)
        macs = codec.macs(vectors, attention.key_dim)
        cycles = -(-macs // hardware.encoder_macs)
        weights = len(coded) * codec_side_bytes(attention, hardware, decoder=False)
    saved = min(saved, op.elements_written * batch)
    cost = product_cost(op, hardware, batch, saved, cycles, schedule=schedule, kept_bytes=kept)
    if not macs:
        return cost
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
    filled = _buffer_fills(run)
    for name, side in (("Q", "query"), ("K", "key"), ("V", "value")):
        rows.append(Traffic(name, "buffer", got[f"{side}_reads"] * word, filled[name]))
        rows.append(Traffic(name, "lines", got[f"{side}_words"] * word, 0))
    if op.codec:
        rows.append(Traffic("latent Q and K", "buffer", *_latent_bytes(run)))
        rows.append(Traffic("codec weights", "buffer", weights, weights))
    if op.bias_params:  # each score that is computed reads its own
        added = counts.scores * hardware.score_bytes
        rows.append(Traffic("attention bias", "dram", moved[CODEC] - weights, 0))
        rows.append(Traffic("attention bias", "buffer", added, moved[CODEC] - weights))
    # Scores: written once, read for the maximum and again for the exponential, written as
    # probabilities after the division and read once by SpMM.
    # Keys in the lists of rows: written and read once.
    scores, keys = counts.scores * hardware.score_bytes, -(-counts.listed * mapping.key_bits // 8)
    sums = got["drained_words"] * hardware.macs_per_line * hardware.accumulator_bytes
    rows += [
        Traffic("index", "buffer", moved[INDEX], moved[INDEX]),  # pointers and bitmaps too
        Traffic("index", "lines", -(-counts.stream_bits // 8), 0),
        Traffic("scores", "buffer", 3 * scores + keys, 2 * scores + keys),
        Traffic("scores", "lines", scores, 0),
        Traffic("output", "buffer", sums + moved[STORE], sums),
    ]
    return tuple(rows)


def _buffer_fills(run: AttentionRun) -> dict[str, int]:
    """Bytes of Q, K and V that are written to their buffers: what comes from DRAM or from the
    decoder, and what the projection left there."""
    op, width, group = run.op, run.hardware.operand_bytes, run.mapping.group
    vector = group * op.key_dim * width
    sizes = (("Q", Q, vector), ("K", K, vector), ("V", V, op.value_dim * width))
    return {name: run.program.tokens(channel) * size for name, channel, size in sizes}


def _latent_bytes(run: AttentionRun) -> tuple[int, int]:
    """(read, written): each token of a chunk of Q or K reads its latents once."""
    program, mapping = run.program, run.mapping
    read = (program.tokens(Q) + program.tokens(K)) * mapping.token_bytes
    if not mapping.resident_latents:
        return read, read
    return read, program.tokens(LATENT) * mapping.token_bytes


def _dram_bytes(program: Program) -> dict[int, int]:
    return {channel: program.dram_bytes(channel) for channel in CHANNELS}
