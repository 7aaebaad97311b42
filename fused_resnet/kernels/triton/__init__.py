"""Triton's kernels: `add_relu`, `conv`, `max_pool`.

`runtime` guards the import; `aot`, `precompile` and `carried` need no GPU.
"""
