"""The tables of the command, a file for each kind: results as rich draws them, in 80 columns."""

from ...moved import old_names

__getattr__ = old_names(__name__)
