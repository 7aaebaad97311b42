"""fuse and unfuse: modules that change their class.

`convert` decides: a block is known to `nn`, has one of the `adapters` (`known_blocks`), or is rewritten (`rewriting`).
The last two get `classes` of their own. What is rewritten is a `forward_graph`, traced under a `watch`. It stands for
the forward as long as what that read is as it was (`reads`).
"""
