"""Triton's kernels: `add_relu`, `bn_act`, `conv`, `max_pool`.

`runtime` guards the import; `aot`, `precompile` and `carried` need no GPU.

Triton takes a quarter of a second to import, so who only may need a kernel imports it where it does.
"""

import os


def is_interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter. Without Triton where no variable asks for it."""
    if "TRITON_INTERPRET" not in os.environ:
        return False
    from fused_resnet.kernels.triton import runtime

    return runtime.INTERPRETED
