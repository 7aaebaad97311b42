"""What is asked of an operator, what is right, and the operators themselves: `torch.ops.fused_resnet`."""

from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, conv_problem
from fused_resnet.operators.operands import BnActOperands, ConvOperands
from fused_resnet.operators.problem import AddReluProblem, BnActProblem, ConvProblem

__all__ = [
    "AddReluProblem", "BnActOperands", "BnActProblem", "ConvOperands", "ConvProblem", "add_relu_problem",
    "bn_act_problem", "conv_problem",
]  # fmt: skip
