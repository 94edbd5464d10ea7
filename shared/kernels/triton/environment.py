"""Where the kernels run: compiled on a GPU, or interpreted on a CPU."""

from __future__ import annotations

import triton

# Read once, when the kernels are decorated too: TRITON_INTERPRET must be set before the first import of triton.
# The interpreter holds bfloat16 as integers, so kernels convert what they load to float32 there (UPCAST).
INTERPRETED: bool = triton.knobs.runtime.interpret
