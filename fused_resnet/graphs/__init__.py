"""Traced forwards, and what they are asked: who owns `memory`, who uses `nodes`, `spelling`, `matching` of what fuses.

`tracer` makes the graphs. Here they are only read, save that `nodes.skip_identities` drops what computes nothing.
"""
