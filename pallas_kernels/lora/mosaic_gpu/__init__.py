"""lora_shrink and lora_expand in Pallas Mosaic GPU: Hopper.

Tensor cores of Hopper take 64 rows at least, and a decode tile has few. So the operands are swapped: the weights are
the 64 rows (ranks in shrink, output columns in expand) and the tokens are the narrow side, 8 to 256 wide. A weight
tile comes by one bulk copy with a barrier of its own; only live pages and live rows are copied and waited for, so
weights are read once. What a buffer holds where nothing was copied reaches only products that are not stored, or is
set to zero.

Of a plan, block_r is rounded up to 64, and shrink's stages to 2; `warps` means nothing here: a program is one
warpgroup, which starts its copies `stages - 1` steps ahead.
"""

from pallas_kernels.lora.mosaic_gpu.expand import lora_expand
from pallas_kernels.lora.mosaic_gpu.shrink import lora_shrink

__all__ = ["lora_expand", "lora_shrink"]
