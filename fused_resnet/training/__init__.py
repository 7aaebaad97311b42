"""What a block in training mode computes: convolutions, norms with the batch's statistics, and what follows them."""

from fused_resnet.training.batch_norm import bn_act
from fused_resnet.training.recomputing import convolution, keeps_no_input, recompute_inputs

__all__ = ["bn_act", "convolution", "keeps_no_input", "recompute_inputs"]
