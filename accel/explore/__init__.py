"""Many machines, many workloads: what is tried (`grid`), each pair simulated once over
processes (`sweep`, `processes`, `results_file`, `fingerprint`), what was found (`points`,
`pareto`), and its words and pictures (`labels`, `plots`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
