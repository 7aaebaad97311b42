"""Convolutions in Triton: `configs`, `cost` and `launch`; four kernels, what they share, and `row_space`."""
