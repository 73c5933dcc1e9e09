"""How many MACs a machine has, in the words that every table has for it.

"Equal MACs" compares the lines; encoder and decoder have MACs of their own, which come on top
and run nothing but the codec. A table of machines therefore names both.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..hardware import Hardware
from .report import Report


def macs_words(hardware: Hardware, codec: bool = True) -> str:
    """ "512 MACs + 320 of the codec"; without the codec's where it is not in use, or where the
    machine has none."""
    lines = f"{hardware.macs:,} MACs"
    if not (codec and hardware.codec_macs):
        return lines
    return f"{lines} + {hardware.codec_macs:,} of the codec"


def cut_words(hardware: Hardware, codec: bool = True) -> str:
    """The same, with lines, encoder and decoder apart: how a machine's MACs are cut up."""
    parts = [f"{hardware.lines} x {hardware.macs_per_line} in lines"]
    if codec and hardware.codec_macs:
        parts += [f"encoder {hardware.encoder_macs}", f"decoder {hardware.decoder_macs}"]
    return f"{macs_words(hardware, codec)} ({', '.join(parts)})"


def uses_codec(report: Report) -> bool:
    """Whether encoder or decoder worked in this run."""
    return any(op.codec_macs for op in report.ops)


def machines_words(reports: Mapping[str, Report]) -> str:
    """ "512 MACs: systolic, sanger. 512 MACs + 320 of the codec: vitcod.": who has what, by name,
    the codec's where it is in use."""
    groups: dict[str, list[str]] = {}
    for name, report in reports.items():
        words = cut_words(report.hardware, uses_codec(report))
        groups.setdefault(words, []).append(name)
    return " ".join(f"{words}: {', '.join(names)}." for words, names in groups.items())


def equal_words(reports: Mapping[str, Report]) -> str:
    """What compared machines have as much of: MACs of the lines, or no more than so many in all."""
    machines = {report.hardware for report in reports.values()}
    if len(machines) == 1:
        (hardware,) = machines
        return f"{macs_words(hardware, codec=False)} in lines"
    return f"at most {max(hardware.total_macs for hardware in machines):,} MACs in all"


GAIN = 0.01
"""Less of cycles or bytes than this share is no gain of the codec's."""


def codec_note(reports: Mapping[str, Report]) -> list[str]:
    """`codec_words` where ViTCoD's machine stands beside the same one without the codec."""
    coded, plain = reports.get("vitcod"), reports.get("vitcod_no_codec")
    if coded is None or plain is None or not uses_codec(coded):
        return []
    return [codec_words(coded, plain)]


def codec_words(coded: Report, plain: Report) -> str:
    """What the codec gains in attention, against the same machine without it: a sentence.

    Cycles and DRAM bytes decide; "no gain" is said where neither is less by `GAIN` of it.
    """
    cycles = (coded.attention_cycles, plain.attention_cycles)
    moved = (coded.dram_bytes(), plain.dram_bytes())
    figures = (
        f"{cycles[0]:,} cycles of attention and {moved[0] / 1e3:,.0f} kB of DRAM traffic with "
        f"it, {cycles[1]:,} and {moved[1] / 1e3:,.0f} kB without"
    )
    if all(with_it > (1 - GAIN) * without for with_it, without in (cycles, moved)):
        return f"The codec gives no gain here: {figures}."
    changes = f"cycles by {_change(*cycles)} and bytes by {_change(*moved)}"
    return f"The codec changes {changes}: {figures}."


def _change(with_it: int, without: int) -> str:
    return f"{with_it / without - 1:+.1%}" if without else "an unknown share"
