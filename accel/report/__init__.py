"""What a simulation found and what it costs: `Report` and its sums (`report`), energy and area
by a named profile (`energy`, `profiles`), processors beside the accelerator (`roofline`), and
reports side by side (`speedups`)."""

from ...moved import old_names

__getattr__ = old_names(__name__)
