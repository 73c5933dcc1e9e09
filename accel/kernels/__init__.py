"""Attention and the deformable operator on real processors: the only part of `sievit.accel`
that imports torch.

Floor plan: rows of floats for compiled loops (`vectors`) and threads for them (`threads`);
order and tiles of a mask (`tiling`) -> a layer's plan (`plan`) -> kernels (`attention_cpu`,
`attention_gpu`) -> their operators (`operators`) -> the function and its choice of a kernel
(`attention`). Beside them the simulated machine's integers on batches (`int8`), dense
attention, timed (`measure`), and the deformable operator: geometry (`deform_shapes`) ->
kernels (`deform_cpu` on `deform_vectors`, `deform_gpu`, `deform_torch`) -> the operator
(`deform`).
"""

from .attention import Choice, SparseAttention, choose_kernel, reference_attention, sparse_attention
from .deform import deform_conv, deform_core
from .int8 import Arithmetic, Int8Attention, Int8Scales, RangeWatcher, int8_attention
from .measure import MeasuredAttention, measure_attention
from .plan import AttentionPlan, plan_attention, plan_layers

__all__ = [
    "Arithmetic",
    "AttentionPlan",
    "Choice",
    "Int8Attention",
    "Int8Scales",
    "MeasuredAttention",
    "RangeWatcher",
    "SparseAttention",
    "choose_kernel",
    "deform_conv",
    "deform_core",
    "int8_attention",
    "measure_attention",
    "plan_attention",
    "plan_layers",
    "reference_attention",
    "sparse_attention",
]
