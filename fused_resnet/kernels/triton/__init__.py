"""Triton's kernels: `add_relu`, `conv`; `runtime` guards the import; `aot`, `precompile` and `carried` need no GPU."""
