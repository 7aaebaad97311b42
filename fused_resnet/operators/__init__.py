"""What is asked of an operator, what is right, and the operators themselves: `torch.ops.fused_resnet`."""

from fused_resnet.operators.describe import add_relu_problem, bn_act_problem, chain_problem, conv_problem
from fused_resnet.operators.operands import BnActOperands, ChainOperands, ConvOperands
from fused_resnet.operators.problem import AddReluProblem, BnActProblem, ChainProblem, ConvProblem

__all__ = [
    "AddReluProblem", "BnActOperands", "BnActProblem", "ChainOperands", "ChainProblem", "ConvOperands", "ConvProblem",
    "add_relu_problem", "bn_act_problem", "chain_problem", "conv_problem",
]  # fmt: skip
