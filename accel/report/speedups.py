"""Reports side by side: speed-ups that say what they are against, on what part, at what batch."""

from __future__ import annotations

from collections.abc import Mapping

from .report import Report
from .roofline import Speedup


def speedups(reports: Mapping[str, Report], against: str) -> tuple[Speedup, ...]:
    """Each report against the one named ``against``: attention alone, then end to end.

    Raises ValueError where that name is not among the reports, or where they are not of one
    workload and batch.
    """
    if against not in reports:
        raise ValueError(f"against must be one of {', '.join(reports)}, got {against!r}")
    base = reports[against]
    made = []
    for name, report in reports.items():
        if (report.workload, report.batch) != (base.workload, base.batch):
            raise ValueError(
                f"{name} runs {report.workload} at batch {report.batch}, {against} runs "
                f"{base.workload} at batch {base.batch}"
            )
        times = {
            "attention": (base.attention_seconds, report.attention_seconds),
            "end to end": (base.seconds, report.seconds),
        }
        for part, (other, own) in times.items():
            if own and other:
                own_label, other_label = (
                    f"{who}, batch {report.batch} (simulated)" for who in (name, against)
                )
                made.append(Speedup(other / own, part, own_label, other_label, "simulated"))
    return tuple(made)
