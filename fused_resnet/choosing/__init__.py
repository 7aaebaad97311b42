"""Which backend computes what: the choice, what was measured for it on this machine, and who runs the operators.

- `decide`: what is unknown of a plan's convolutions, found out on this machine, in a `process` of its own where needed
- `piece`: a run of a plan's convolutions; `pieces`: which of them are computed in one call; `outright`: for which that
  is found out first. `region_checks`: whether it is right, on `material`
- `candidates` for a problem; `checking` them; `timing` them; `planned`: the call that is checked and timed
- `case` and `cases`: operands, the reference, and the error that is allowed
- `winners`: what was found, from `winners_file`; `choice`: the backend and config for a problem
- `dispatch`: the operators on every device, by that choice; `repeated`: calls like one before
"""

from fused_resnet.choosing.choice import Selection, fixed_order, select

__all__ = ["Selection", "fixed_order", "select"]
