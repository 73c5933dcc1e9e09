"""Training, over minutes or days: how a step is made (`recipe`), what it minimises
(`objectives`, `blocks`), its batches (`feeding`), its processes and checkpoints, and the loop
(`loop`, `distill`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
