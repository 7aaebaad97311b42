"""Traced forwards: the `tracer`, who owns `memory`, questions to `nodes`, `spelling`, and `matching` of what fuses."""
