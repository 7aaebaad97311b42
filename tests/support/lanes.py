"""An instruction under test, executed once a lane on tables of values."""

import numpy

from fused_resnet.emulation import Kernel
from tests.support.ptx import kernel_text

_REGISTER = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def outcome_of(instructions, *inputs, out, target="sm_90a", **options):
    """(results, outcome) of instructions that name their sources $a $b $c $f and their results $d $e.

    inputs: arrays of one length, a thread an element; bf16 and fp8 as codes. out: the type of $d, or of $d and $e.
    """
    outs = out if isinstance(out, tuple) else (out,)
    inputs = [numpy.ascontiguousarray(array) for array in inputs]
    length = len(inputs[0])
    results = [numpy.zeros(length, kind) for kind in outs]
    names = {}
    load, save = [], []
    for k, (letter, array) in enumerate(zip("abcf", inputs)):
        size = array.dtype.itemsize
        names[letter] = f"{_REGISTER[size]}{10 + k}"
        load += _address(f"in{k}", size)
        load.append(f"  ld.global.b{8 * size} {names[letter]}, [%d3];")
    for k, (letter, array) in enumerate(zip("de", results)):
        size = array.dtype.itemsize
        names[letter] = f"{_REGISTER[size]}{20 + k}"
        save += _address(f"out{k}", size)
        save.append(f"  st.global.b{8 * size} [%d3], {names[letter]};")
    for letter, register in names.items():
        instructions = instructions.replace("$" + letter, register)
    body = "\n".join(["  mov.u32 %r0, %tid.x;", *load, instructions, *save, "  ret;"])
    parameters = [f".param .u64 in{k}" for k in range(len(inputs))] + [f".param .u64 out{k}" for k in range(len(outs))]
    text = kernel_text(body, ", ".join(parameters), target=target).replace("<256>", "<32>")  # registers, to be quick
    kernel = Kernel(text)
    outcome = kernel.run(1, length, [*inputs, *results], writable=results, **options)
    return results if isinstance(out, tuple) else results[0], outcome


def lanes(instructions, *inputs, out, **options):
    """The results alone; nothing may have been reported."""
    results, outcome = outcome_of(instructions, *inputs, out=out, **options)
    assert outcome.reports == []
    return results


def _address(parameter, size):
    return [f"  ld.param.u64 %d2, [{parameter}];", f"  mad.wide.u32 %d3, %r0, {size}, %d2;"]
