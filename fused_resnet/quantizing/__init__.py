"""What int8 needs to know of a model's tensors: `calibrate` looks at them, `scales` keeps what it found."""

from fused_resnet.quantizing.scales import Scales

__all__ = ["Scales"]
