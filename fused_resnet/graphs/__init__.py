"""Traced forwards, and what they are asked: who owns `memory`, who uses `nodes`, `spelling`, `matching` of what fuses.

`tracer` makes the graphs, and `random_state` says whether a forward drew numbers meanwhile. Graphs are only read here,
save that `nodes` drops what computes nothing and adds children.
"""
