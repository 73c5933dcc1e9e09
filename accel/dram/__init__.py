"""A DDR4 memory, stepped command by command: its timing and geometry (`ddr4`), its registers
(`state`), the controller of a channel (`controller`), where tensors lie (`address`), and how
fast it serves a trace of requests (`bandwidth`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
