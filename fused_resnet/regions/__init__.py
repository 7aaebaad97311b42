"""Pieces of a network that C++ runs as one call (csrc/cpu/blocked): how they are laid out and written down.

`layout` packs weights, `program` writes the steps, `blocks` knows residual blocks. Nothing is chosen here.
"""
