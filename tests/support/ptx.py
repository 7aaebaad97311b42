"""Small PTX kernels, written as the instructions they are about."""

_REGISTERS = (
    (".pred", "%p", 16), (".b16", "%h", 32), (".b32", "%r", 256), (".f32", "%f", 256), (".b64", "%d", 64),
    (".f64", "%fd", 16),
)  # fmt: skip


def kernel_text(body: str, parameters: str = ".param .u64 out", shared: str = "", target: str = "sm_90a") -> str:
    """One kernel `k`. shared: declarations of shared variables, at the module's level.

    %p0-15 are predicates, %h of 16 bits, %r of 32 bits, %f fp32, %d of 64 bits, %fd fp64.
    """
    registers = "\n".join(f"  .reg {kind} {name}<{count}>;" for kind, name, count in _REGISTERS)
    return f""".version 8.7
.target {target}
.address_size 64
{shared}
.visible .entry k({parameters})
{{
{registers}
{body}
}}
"""
