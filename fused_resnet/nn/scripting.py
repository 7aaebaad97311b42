"""What torch.jit.script cannot compile says so."""

from __future__ import annotations


class NotScriptable:
    """Modules whose forward is no TorchScript: what is fused, and what is frozen."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}: unfuse or unfreeze the model first, or use "
            "torch.export or torch.jit.trace on the fused one."
        )
