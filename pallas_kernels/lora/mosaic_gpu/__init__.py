"""lora_shrink and lora_expand in Pallas Mosaic GPU: Hopper.

Hopper's tensor cores need at least 64 rows, and a decode tile has few. So the operands are swapped: weights are the 64
rows (ranks in shrink, output columns in expand) and tokens are the narrow side, 8 to 256 wide. Each weight tile is one
bulk copy with its own barrier. Only live pages and live rows are copied, so weights are read once. Unwritten parts of a
buffer are set to zero, or affect only products that are not stored.

A plan's block_r is rounded up to 64, and shrink's stages to at least 2. `warps` is ignored: a program is one warpgroup,
which starts its copies `stages - 1` steps ahead.
"""

from pallas_kernels.lora.mosaic_gpu.expand import lora_expand
from pallas_kernels.lora.mosaic_gpu.shrink import lora_shrink

__all__ = ["lora_expand", "lora_shrink"]
