"""Pieces of a network that C++ runs as one call (csrc/cpu/blocked): how they are laid out and written down.

`layout` packs weights, `program` writes the steps. `blocks` knows residual blocks, `fragment` runs of any convolutions
and poolings, `kernels` what computes them here. Nothing is chosen here.
"""
