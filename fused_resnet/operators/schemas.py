"""The operators' schemas, written once. Python registers them; the C++ libraries carry a digest of them.

Plain strings and no imports of ours, so that setup.py can read this file without building anything.
"""

from __future__ import annotations

import hashlib

_CONV_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, "
    "float eps, Tensor? bias, Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "SymInt groups, str activation"
)

# What users call, through `functional` or torch.ops.
PUBLIC = {
    "conv_bn_act": f"({_CONV_OPERANDS}, str backend, *, bool channels_last=True) -> Tensor",
    "add_relu": "(Tensor a, Tensor b, str backend) -> Tensor",
    "add_relu_backward": "(Tensor grad, Tensor out, str backend) -> Tensor",
    # Without mean and var those of the batch are computed and returned, else both are empty. mask:
    # `BnActProblem.mask_shape`.
    "bn_act": "(Tensor x, Tensor? mean, Tensor? var, Tensor? weight, Tensor? bias, Tensor? residual, float eps, "
    "str activation, str backend) -> (Tensor y, Tensor batch_mean, Tensor batch_var, Tensor mask)",
    # y, and what the next block's 1x1 makes of it: empty without reduce_weight. Of folded weights, in frozen plans.
    "bottleneck_chain": "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor expand_weight, "
    "Tensor expand_bias, Tensor? reduce_weight, Tensor? reduce_bias, str activation, str backend) "
    "-> (Tensor y, Tensor reduced)",
    # of x, weight, bias and residual; the first and the last are empty where they are not needed
    "bn_act_backward": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "Tensor? residual, Tensor mask, float eps, bool is_training, str activation, bool needs_x, bool needs_residual, "
    "str backend) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)",
}

# One kernel each, implemented in csrc/; they write into `out` and never allocate. The first word is the library.
KERNELS = {
    "cpu": {
        "cpu_add_relu": "(Tensor a, Tensor b, Tensor(a!) out) -> ()",
        "cpu_winograd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] padding, str activation, "
        "Tensor(a!) out) -> ()",
        "cpu_grouped_conv": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, "
        "str activation, Tensor(a!) out) -> ()",
        "cpu_direct_conv": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding, "
        "int[2] dilation, str activation, Tensor(a!) out) -> ()",
        "cpu_max_pool2d": "(Tensor x, int[2] kernel_size, int[2] stride, int[2] padding, Tensor(a!) out) -> ()",
        "cpu_affine_act": "(Tensor(a!) y, Tensor? bn_weight, Tensor? bn_bias, Tensor? bn_mean, Tensor? bn_var, "
        "float eps, Tensor? residual, str activation) -> ()",
        "cpu_bn_statistics": "(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()",
        # mask: `BnActProblem.mask_shape`, None where it is not wanted
        "cpu_bn_act": "(Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, "
        "str activation, Tensor(a!)? mask, Tensor(b!) y) -> ()",
        # of g, the gradient behind the activation, and of g * (x - mean)
        "cpu_bn_act_sums": "(Tensor grad, Tensor x, Tensor mean, Tensor? mask, Tensor(a!) sum, Tensor(b!) dot) -> ()",
        # without the sums, of constant statistics
        "cpu_bn_act_backward": "(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor? weight, float eps, "
        "Tensor? mask, Tensor? sum, Tensor? dot, Tensor(a!)? grad_x, Tensor(b!)? grad_residual) -> ()",
        # the steps of a program (csrc/cpu/blocked/program.h); kernel: a row of the table by name, or "" for the fastest
        "cpu_region": "(Tensor program, Tensor[] inputs, Tensor[] weights, Tensor[] biases, str kernel, "
        "Tensor(a!) workspace, Tensor(b!)[] outputs) -> ()",
        # a line per row: name, dtype, "chosen" or "named", registers, reason, why it cannot run here; tabs between them
        "cpu_region_kernels": "() -> str",
        # its name, why that one, and what to warn of, if anything
        "cpu_instruction_set": "() -> (str, str, str)",
    },
    "cuda": {
        "cuda_add_relu": "(Tensor a, Tensor b, Tensor(a!) out) -> ()",
        "cuda_add_relu_backward": "(Tensor grad, Tensor out, Tensor(a!) grad_input) -> ()",
        # partials: (splits, values of out) in fp32, for a config with more than one
        "cuda_conv_bn_act": f"({_CONV_OPERANDS}, bool allow_tf32, int tile, Tensor(a!)? partials, Tensor(b!) out) "
        "-> ()".replace("SymInt", "int"),
        # of bytes, as `quantized.Epilogue` says; partials: in int32
        "cuda_conv_int8": "(Tensor x, Tensor weight, Tensor multiplier, Tensor bias, Tensor? residual, "
        "float residual_scale, float low, float high, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "int tile, Tensor(a!)? partials, Tensor(b!) out) -> ()",
        # why the kernel cannot index this problem, empty where it can
        "cuda_conv_why_not": "(int[4] x, int[4] weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "int element_bytes) -> str",
        # tile, splits, tile, splits, ...: all that the device can run, the likeliest first
        "cuda_conv_configs": "(int[4] x, int[4] weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
        "int element_bytes, bool is_aligned, int device) -> int[]",
    },
}


def digest(library: str) -> str:
    """Identifies the schemas a library ("cpu" or "cuda") was compiled against."""
    text = "\n".join(f"{name}{schema}" for name, schema in sorted(KERNELS[library].items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
