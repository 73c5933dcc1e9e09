"""Dense products and vector work in closed form, the same for every machine.

`array` lays a product out on the MACs, `operands` counts what DRAM reads for it, `vector` times
work without products, `epilogue` finds what of that is fused with a product, and `cost` makes the
costs of a report from them.
"""

from .array import Layout, array_cycles, laid_out, layouts
from .cost import PLAIN, Results, group_costs, network_costs, op_cost, product_cost
from .epilogue import Epilogue, epilogue
from .operands import Product, as_product, spare_bytes
from .vector import vector_cost

__all__ = [
    "PLAIN",
    "Epilogue",
    "Layout",
    "Product",
    "Results",
    "array_cycles",
    "as_product",
    "epilogue",
    "group_costs",
    "laid_out",
    "layouts",
    "network_costs",
    "op_cost",
    "product_cost",
    "spare_bytes",
    "vector_cost",
]
