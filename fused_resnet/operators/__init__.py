"""What is asked of an operator, what is right, and the operators themselves: `torch.ops.fused_resnet`."""

from fused_resnet.operators.problem import AddReluProblem, ConvOperands, ConvProblem, add_relu_problem, conv_problem

__all__ = ["AddReluProblem", "ConvOperands", "ConvProblem", "add_relu_problem", "conv_problem"]
