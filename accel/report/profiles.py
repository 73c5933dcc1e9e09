"""Named profiles of what one event costs: picojoules, square micrometres, and their sources.

Published int8 MAC energies differ fourfold at one node and SRAM twofold by cell type, so
every figure stands beside where it is from, and a profile can be replaced by the user's own
(`load_profile`). Sizes are bytes, nodes nanometres. Used by `sievit.accel.report.energy`.
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

WORD_BYTES = 8
"""Bytes of one access in an SRAM table."""


def _positive(name: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


@dataclass(frozen=True)
class Sram:
    """One RAM of a table: an access reads or writes a word of 8 bytes."""

    node_nm: float
    size_bytes: int
    read_pj: float
    write_pj: float
    area_mm2: float
    leakage_mw: float | None

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name != "leakage_mw" or value is not None:
                _positive(f"sram {item.name}", value)


# CACTI 7.0, single-port RAM, 64-bit word: size in KB, node in nm; with itrs-hp cells read pJ,
# write pJ, area mm2, leakage mW; and with itrs-lop cells read pJ.
_CACTI = (
    (2, 22, 0.69, 1.02, 0.0021, 0.8, 0.47),
    (2, 32, 1.42, 2.09, 0.0043, 1.6, 0.73),
    (2, 45, 2.67, 3.98, 0.0084, 3.0, 1.5),
    (8, 22, 1.73, 1.93, 0.0071, 2.9, 1.21),
    (8, 32, 3.33, 3.92, 0.015, 5.9, 1.86),
    (8, 45, 6.05, 7.41, 0.029, 11.0, 3.62),
    (20, 22, 3.8, 2.86, 0.0165, 6.5, 2.13),
    (20, 32, 7.17, 5.87, 0.035, 13.6, 3.24),
    (20, 45, 12.8, 11.2, 0.069, 25.7, 7.86),
    (32, 22, 4.0, 3.24, 0.03, 10.5, 2.44),
    (32, 32, 9.69, 7.68, 0.054, 21.7, 3.66),
    (32, 45, 17.0, 14.5, 0.106, 41.0, 8.27),
    (53, 22, 5.61, 4.38, 0.047, 17.2, 3.27),
    (53, 32, 10.5, 8.78, 0.099, 36.0, 4.87),
    (53, 45, 18.5, 16.4, 0.197, 68.0, 9.67),
    (108, 22, 7.71, 5.43, 0.1, 32.7, 5.45),
    (108, 32, 15.0, 11.3, 0.212, 67.0, 8.15),
    (108, 45, 33.4, 22.1, 0.373, 126.0, 16.1),
    (320, 22, 13.2, 9.85, 0.284, 96.0, 8.37),
    (320, 32, 25.0, 19.6, 0.602, 199.0, 12.2),
    (320, 45, 44.6, 36.2, 1.19, 376.0, 26.7),
)

CACTI_HP = tuple(Sram(node, size * 1024, *row[:4]) for size, node, *row in _CACTI)
"""High-performance cells."""

CACTI_LOP = tuple(
    Sram(node, size * 1024, lop_pj, write_pj * lop_pj / read_pj, area_mm2, None)
    for size, node, read_pj, write_pj, area_mm2, _, lop_pj in _CACTI
)
"""Low-operating-power cells. Only reads were tabulated: writes are those of the hp cells
times the ratio of the reads, the area is theirs, and leakage is not known."""

DRAM_PJ_PER_BIT = {
    "ddr4-2400 stream": 13.7,  # DRAMsim3 with datasheet IDD currents, no I/O termination
    "ddr4-2400 random rows": 19.8,  # likewise
    "ddr4-2400 one bank": 97.0,  # likewise, a new row each time
    "lpddr4-2400 stream": 19.3,  # likewise, 64 bits of x16 parts
    "lpddr4-2400 random rows": 33.0,  # likewise
    "hbm2 stream": 2.9,  # likewise
    "hbm2 random rows": 4.5,  # likewise
    "lpddr4": 8.0,  # Accelergy's CACTI plug-in table
    "lpddr": 40.0,  # Malladi et al., ISCA 2012, through the same table
    "ddr3": 70.0,  # Malladi et al., ISCA 2012, through the same table
    "gddr5": 14.0,  # Chatterjee et al., MICRO 2017, through the same table
    "hbm2": 3.9,  # O'Connor et al., MICRO 2017, through the same table
}
"""Choices for `EnergyProfile.dram_pj_per_bit`, each with its source beside it."""

FIGURES = (
    "mac_pj",
    "dram_pj_per_bit",
    "register_pj_per_byte",
    "softmax_pj",
    "vector_pj",
    "mac_area_um2",
    "gate_area_um2",
)


@dataclass(frozen=True)
class EnergyProfile:
    """What one event costs. None = no figure: named in the result as not charged.

    mac_pj                one int8 multiply-accumulate into 32 bits
    dram_pj_per_bit       read or written
    register_pj_per_byte  a byte that a MAC line takes into its register
    softmax_pj            a lane of the softmax unit working for one cycle
    vector_pj             a lane of the vector unit working for one cycle
    mac_area_um2          one MAC, those of encoder and decoder alike
    gate_area_um2         a gate equivalent (a two-input NAND gate), of registers and crossbars
    sram                  the RAM table, interpolated linearly in node and in log(size)
    sources               for every figure that is given (and "sram"): where it is from

    Raises ValueError, naming the field, for a figure that is not positive or has no source.
    """

    name: str
    node_nm: float
    mac_pj: float
    dram_pj_per_bit: float
    sources: Mapping[str, str]
    register_pj_per_byte: float | None = None
    softmax_pj: float | None = None
    vector_pj: float | None = None
    mac_area_um2: float | None = None
    gate_area_um2: float | None = None
    sram: tuple[Sram, ...] = CACTI_HP

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a word that results carry, got {self.name!r}")
        _positive("node_nm", self.node_nm)
        for name in FIGURES:
            value = getattr(self, name)
            if value is not None or name in ("mac_pj", "dram_pj_per_bit"):
                _positive(name, value)
        given = {name for name in FIGURES if getattr(self, name) is not None} | {"sram"}
        missing = sorted(name for name in given if not self.sources.get(name))
        if missing:
            raise ValueError(f"profile {self.name!r} gives no source for {', '.join(missing)}")
        _bracket(self.node_nm, {row.node_nm for row in self.sram})

    def sram_read_pj(self, size_bytes: int) -> float:
        """One byte out of a RAM of this size."""
        return self._sram(size_bytes, lambda row: row.read_pj, math.log) / WORD_BYTES

    def sram_write_pj(self, size_bytes: int) -> float:
        """One byte into a RAM of this size."""
        return self._sram(size_bytes, lambda row: row.write_pj, math.log) / WORD_BYTES

    def sram_area_mm2(self, size_bytes: int) -> float:
        """Interpolated in size itself: area is nearly proportional to it."""
        return self._sram(size_bytes, lambda row: row.area_mm2, float)

    def sram_leakage_mw(self, size_bytes: int) -> float | None:
        """As the area; None where the table has no leakage."""
        if any(row.leakage_mw is None for row in self.sram):
            return None
        return self._sram(size_bytes, lambda row: row.leakage_mw or 0.0, float)

    def _sram(
        self, size_bytes: int, value: Callable[[Sram], float], scale: Callable[[float], float]
    ) -> float:
        """``value`` at this node and size. Beyond the table's sizes: the smallest RAM's
        figure below it, the slope of the last two above it."""
        low, high = _bracket(self.node_nm, {row.node_nm for row in self.sram})
        ends = []
        for node in (low, high):
            points = sorted((r.size_bytes, value(r)) for r in self.sram if r.node_nm == node)
            ends.append(_at([(scale(x), y) for x, y in points], scale(size_bytes)))
        share = (self.node_nm - low) / (high - low) if high > low else 0.0
        return ends[0] + share * (ends[1] - ends[0])


def _at(points: list[tuple[float, float]], x: float) -> float:
    if len(points) == 1 or x <= points[0][0]:
        return points[0][1]
    index = next((i for i in range(1, len(points) - 1) if x <= points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _bracket(node_nm: float, nodes: set[float]) -> tuple[float, float]:
    """The table's nodes on both sides of this one."""
    below, above = [n for n in nodes if n <= node_nm], [n for n in nodes if n >= node_nm]
    if not below or not above:
        known = ", ".join(f"{n:g}" for n in sorted(nodes)) or "none"
        raise ValueError(f"node_nm is {node_nm:g}, the SRAM table has {known}")
    return max(below), min(above)


_HP = "CACTI 7.0, itrs-hp cells, single port, 64-bit word; between 22, 32 and 45 nm by line"
_DDR4 = "DRAMsim3 with DDR4-2400 datasheet currents, streaming, no I/O termination"
_HOROWITZ = (
    "Horowitz, ISSCC 2014, 45 nm, 0.9 V: int8 multiply 0.2 + int32 add 0.1 (the int8 figure as "
    "re-quoted in public code)"
)
_NAND2_45NM_UM2 = 0.798
_NANGATE = "NAND2_X1 of the NanGate 45 nm open cell library, 0.798 um2{}"
_ALADDIN = "Shao et al., ISCA 2014 (Aladdin), scaled by hwcomponents-library 1.0.58, {} nm"


def _profile(name: str, node_nm: int, mac_pj: float, mac_source: str) -> EnergyProfile:
    """Aladdin gives registers and MAC areas to both MAC tables: Horowitz has neither. A gate's
    area is that of an open cell library at 45 nm, scaled: no open one has these nodes."""
    register, area_um2 = {22: (0.024, 247.0), 28: (0.043, 369.0), 45: (0.083, 986.0)}[node_nm]
    aladdin = _ALADDIN.format(node_nm)
    scaled = "" if node_nm == 45 else f", by the square of {node_nm} / 45"
    sources = {
        "mac_pj": mac_source,
        "dram_pj_per_bit": _DDR4,
        "register_pj_per_byte": aladdin,
        "mac_area_um2": aladdin,
        "gate_area_um2": _NANGATE.format(scaled),
        "sram": _HP,
    }
    dram = DRAM_PJ_PER_BIT["ddr4-2400 stream"]
    return EnergyProfile(
        name,
        node_nm,
        mac_pj,
        dram,
        sources,
        register_pj_per_byte=register,
        mac_area_um2=area_um2,
        gate_area_um2=_NAND2_45NM_UM2 * (node_nm / 45) ** 2,
    )


_ALADDIN_28 = _profile("aladdin-28nm", 28, 0.59, _ALADDIN.format(28))
_HOROWITZ_28 = _profile(
    "horowitz-28nm", 28, 0.3 * 0.59 / 1.15, _HOROWITZ + "; to 28 nm by Aladdin's ratio 0.59 / 1.15"
)
_LOP = replace(
    _HOROWITZ_28,
    name="horowitz-28nm-lop",
    sram=CACTI_LOP,
    sources=dict(_HOROWITZ_28.sources)
    | {"sram": "CACTI 7.0, itrs-lop cells: reads; writes by the ratio of reads to itrs-hp"},
)
PROFILES: dict[str, EnergyProfile] = {
    profile.name: profile
    for profile in (
        _ALADDIN_28,
        _HOROWITZ_28,
        _LOP,
        _profile("aladdin-22nm", 22, 0.34, _ALADDIN.format(22)),
        _profile("aladdin-45nm", 45, 1.15, _ALADDIN.format(45)),
        _profile("horowitz-45nm", 45, 0.3, _HOROWITZ),
    )
}
"""By name. "aladdin-28nm", the default, has the node of ViTCoD's chip and no figure that was
scaled here but the area of a gate; "horowitz-28nm-lop" is the lowest at that node, so the two
bracket a result."""


def load_profile(path: str | os.PathLike[str]) -> EnergyProfile:
    """A profile of the user's own, from TOML, or from JSON where the name ends in .json.

    ``base`` names one of `PROFILES` whose figures are kept where the file gives none;
    a figure given here needs its line in ``[sources]``. ``[[sram]]`` tables (the fields of
    `Sram`, node_nm being the profile's unless given) replace the RAM table.

    Raises ValueError, naming the file and the value, for anything else.
    """
    with open(path, "rb") as file:
        try:
            read = json.load if str(path).endswith(".json") else tomllib.load
            return _profile_of(read(file))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an energy profile ({error})") from None


def _profile_of(table: dict[str, Any]) -> EnergyProfile:
    base = table.pop("base", None)
    if base is not None and base not in PROFILES:
        raise ValueError(f"base must be one of {', '.join(PROFILES)}, got {base!r}")
    known = {item.name for item in fields(EnergyProfile)}
    unknown = sorted(set(table) - known)
    if unknown:
        raise ValueError(f"unknown {', '.join(unknown)}; known: base, {', '.join(sorted(known))}")
    if base is not None and table.get("name", base) == base:
        raise ValueError(f"name must differ from the base's, {base!r}: results carry it")
    kept: dict[str, Any] = {"sources": {}}
    if base is not None:
        kept = {item.name: getattr(PROFILES[base], item.name) for item in fields(EnergyProfile)}
    sources = {k: v for k, v in kept["sources"].items() if k not in table}
    table["sources"] = sources | table.get("sources", {})
    if "sram" in table:
        node = table.get("node_nm", kept.get("node_nm"))
        rows = ({"node_nm": node, "leakage_mw": None} | row for row in table["sram"])
        table["sram"] = tuple(Sram(**row) for row in rows)
    elif base is None:
        table["sources"].setdefault("sram", _HP)
    return EnergyProfile(**(kept | table))
