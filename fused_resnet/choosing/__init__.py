"""Which backend computes what: the choice, what was measured for it on this machine, and who runs the operators.

- `choice`: the backend and config for a problem; `dispatch`: the operators on every device, by that choice
- `winners`: what was measured, from `winners_file`
"""

from fused_resnet.choosing.choice import Selection, fixed_order, select

__all__ = ["Selection", "fixed_order", "select"]
