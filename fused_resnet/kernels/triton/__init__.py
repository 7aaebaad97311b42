"""Triton's kernels: `add_relu`, `conv`; `runtime` guards the import; `aot` and `precompile` need no GPU."""
