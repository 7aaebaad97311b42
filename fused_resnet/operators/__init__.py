"""What is asked of an operator, what is right, and the operators themselves: `torch.ops.fused_resnet`."""

from fused_resnet.operators.describe import add_relu_problem, conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

__all__ = ["AddReluProblem", "ConvOperands", "ConvProblem", "add_relu_problem", "conv_problem"]
