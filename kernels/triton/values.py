"""Weighing values."""

# Arguments of Triton kernels have no Python types.
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def weighted_columns(b_weight, b_v, b_acc):
    """b_acc [DP, GP] + b_v [BN, DP] transposed @ b_weight [BN, GP], keeping weights beyond the
    precision of the values: their rounding errors go into a second product."""
    b_v = tl.trans(b_v)
    if b_v.dtype == tl.float32:
        return tl.dot(b_v, b_weight, b_acc, input_precision="ieee")
    else:
        b_coarse = b_weight.to(b_v.dtype)
        b_acc = tl.dot(b_v, b_coarse, b_acc)
        return tl.dot(b_v, (b_weight - b_coarse.to(tl.float32)).to(b_v.dtype), b_acc)
