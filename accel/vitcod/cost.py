"""The cost of one attention call that the engine has stepped: cycles, MACs, and bytes by tensor
and level. What is modelled stands in `engine`, `mapping` and `coded`.
"""

from __future__ import annotations

from ..hardware import Hardware
from ..report.report import OpCost, Traffic
from .core.registers import COUNTS
from .program import CODEC, INDEX, LATENT, STORE, K, Program, Q, V
from .stepped import AttentionRun, head_costs

CHANNELS = {Q: "Q", K: "K", V: "V", INDEX: "index", CODEC: "codec weights", STORE: "output",
            LATENT: "latent Q and K"}  # fmt: skip


def cost_of(run: AttentionRun, batch: int) -> OpCost:
    """The cost of a call that was stepped for ``batch`` images."""
    op, hardware, mapping, counts = run.op, run.hardware, run.mapping, run.counts
    got = dict(zip(COUNTS, (int(x) for x in run.trace.counts), strict=True))
    stalls = run.stalls()
    rate = mapping.hardware.dram_bytes_per_cycle
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
            "decoder": -(-decoded // max(hardware.decoder_macs, 1)),
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
        Traffic("index", "buffer", counts.index_bytes, moved[INDEX]),  # pointers and bitmaps too
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
