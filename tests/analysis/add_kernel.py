"""A Triton kernel for the tests that read compiled programs."""

import triton
import triton.language as tl


@triton.jit
def add(x_ptr, y_ptr, out_ptr, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(out_ptr + rows, tl.load(x_ptr + rows) + tl.load(y_ptr + rows))


@triton.jit
def multiply(x_ptr, y_ptr, out_ptr, block: tl.constexpr):
    rows, columns = tl.arange(0, block)[:, None], tl.arange(0, block)[None, :]
    x, y = tl.load(x_ptr + rows * block + columns), tl.load(y_ptr + rows * block + columns)
    tl.store(out_ptr + rows * block + columns, tl.dot(x, y).to(out_ptr.dtype.element_ty))
