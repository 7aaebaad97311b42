"""What a block in training mode computes: norms with the batch's statistics and what follows them, as `bn_act`."""

from fused_resnet.training.batch_norm import bn_act

__all__ = ["bn_act"]
