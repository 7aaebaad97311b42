"""fuse and unfuse: modules that change their class.

`convert` decides: a block is known to `nn`, has one of the `adapters` (`known_blocks`), or is rewritten (`rewriting`).
What is rewritten comes from `forward_graph`.
"""
