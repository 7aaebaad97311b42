"""A process that compiles our kernels and runs them in the emulator, a line of JSON a case.

TRITON_INTERPRET, which the tests' own process sets, turns kernels into interpreter objects: they cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback

import torch

from fused_resnet.choosing.quantized import quantized_operands
from fused_resnet.emulation import kernel, parser
from fused_resnet.emulation.kernel import LANDINGS, SCHEDULES
from fused_resnet.emulation.operands import operands_of
from fused_resnet.operators import float8, layout, quantized, reference
from fused_resnet.operators.operands import BnActOperands, ConvOperands
from fused_resnet.operators.problem import AddReluProblem, MaxPoolProblem, parsed_problem

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Worker:
    """The parent's side. Use it as a context manager; `ask` returns what the case's function returned."""

    def __enter__(self):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._errors = tempfile.TemporaryFile(mode="w+")
        self._folder = tempfile.TemporaryDirectory(prefix="emulated_")
        environment.setdefault("TRITON_CACHE_DIR", self._folder.name)
        command = [sys.executable, "-m", "tests.support.emulated"]
        self._process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=self._errors)  # fmt: skip
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(60)
        self._folder.cleanup()

    def ask(self, what: str, **arguments):
        print(json.dumps([what, arguments]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the worker ended: {self._errors.read()[-2000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]


# --------------------------------------------------------------------------------------------------- the worker's side


def mode(number: int) -> dict:
    """One of the twelve ways of landing and scheduling, by number."""
    return dict(landing=LANDINGS[number % 3], schedule=SCHEDULES[number // 3 % 4], seed=number)


def answer_of(out, outcomes, expected, bound) -> dict:
    """worst: the largest error as a part of the bound, infinite for NaN."""
    error = ((out.double() - expected).abs() / bound).max().item()
    reports = [report for outcome in outcomes for report in outcome.reports]
    counts = {
        name: sum(getattr(o.counts, name) for o in outcomes) for name in ("mma", "wgmma", "bulk_copies", "cp_async")
    }
    return dict(worst=error if error == error else float("inf"), reports=reports[:3], **counts)


def conv_triton(problem: str, config: list, arch: int, number: int, in_row_space: bool = False) -> dict:
    from fused_resnet.emulation import launches
    from fused_resnet.kernels.triton.conv import configs

    p = parsed_problem(problem, "cuda")
    c = configs.TritonConfig(*config) if config else configs.default_config(p)
    if reason := configs.why_illegal(p, c, arch):
        raise ValueError(f"{c}: {reason}")
    o = operands_of(p)
    with _Watched() as watched:
        if in_row_space:
            out, outcomes = _in_row_space(p, o, arch, c, mode(number))
        else:
            out, outcomes = launches.conv_bn_act(p, o, arch, c, **mode(number))
    expected, bound = _expected(p, o)
    return dict(answer_of(out, outcomes, expected, bound), register_a=watched.register_a, kernels=watched.names)


def _in_row_space(p, o, arch: int, config, how: dict) -> tuple:
    """The output and the residual lie there, as between two convolutions of a plan, and x where the form reads it."""
    from fused_resnet.emulation import launches
    from fused_resnet.kernels.triton.conv import configs, row_space

    rows = torch.full((row_space.num_rows(p.N, p.P, p.Q), p.K), torch.nan, dtype=p.dtype)
    if config.form == "rows_tma" or configs.is_gemm(p):
        o = o._replace(x=row_space.pack(o.x))
    if o.residual is not None:
        o = o._replace(residual=row_space.pack(o.residual))
    outcomes = launches.run_conv(p, o, rows, arch, config, **how)
    out = row_space.unpack(rows, p.N, p.P, p.Q)
    if not out.isnan().any() and not torch.equal(row_space.pack(out), rows):
        raise ValueError(f"{p}, {config}: the halo is not zero")
    return out, outcomes


def conv_int8(problem: str, how: list, arch: int, number: int, in_row_space: bool = False) -> dict:
    """differing: of the output's bytes, those that are not the reference's. how: a config of Triton's kernels, or
    (tile, splits) of csrc's."""
    p = parsed_problem(problem, "cuda")
    o = quantized_operands(p, number)
    expected = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
    poison = layout.channels_last(~expected)
    with _Watched() as watched:
        if len(how) == 2:
            out, outcomes = _int8_by_cuda(p, o, arch, how, poison, mode(number))
        else:
            out, outcomes = _int8_by_triton(p, o, arch, how, poison, in_row_space, mode(number))
    counts = {name: sum(getattr(one.counts, name) for one in outcomes) for name in ("mma", "wgmma", "bulk_copies")}
    reports = [report for one in outcomes for report in one.reports]
    return dict(differing=int((out != expected).sum()), reports=reports[:3], register_a=watched.register_a, **counts)


def conv_float8(problem: str, how: list, arch: int, number: int, in_row_space: bool = False) -> dict:
    """As `answer_of`, with tensor cores that add as this GPU's. differing: the share of the output's values that are
    not the reference's."""
    p = parsed_problem(problem, "cuda")
    o = quantized_operands(p, number)
    expected = quantized.conv_act(o.x, o.weight, o.epilogue, p.stride, p.padding, p.dilation, p.groups, o.residual)
    poison = torch.full(p.output_shape, torch.nan).to(p.dtype).contiguous(memory_format=torch.channels_last)
    with _Watched() as watched:
        way = dict(mode(number), rounding=90 if arch >= 90 else 89)
        out, outcomes = _int8_by_triton(p, o, arch, how, poison, in_row_space, way)
    answer = answer_of(out, outcomes, float8.exact(p, o), float8.error_bound(p, o))
    differing = (out.float() != expected.float()).double().mean().item()
    return dict(answer, differing=differing, register_a=watched.register_a)


def _int8_by_cuda(p, o, arch: int, how: list, out, way: dict) -> tuple:
    from fused_resnet.emulation import cuda_launches

    tile, splits = how
    copies = (16, 8, 0) if tile in cuda_launches.ANY_ALIGNMENT else (16,)
    instances = tuple((tile, copy) for copy in copies)
    return cuda_launches.conv_bn_act(p, o, arch, tile, splits, out=out, instances=instances, **way)


def _int8_by_triton(p, o, arch: int, how: list, out, in_row_space: bool, way: dict) -> tuple:
    """In row space lie the output and the residual."""
    from fused_resnet.emulation import launches
    from fused_resnet.kernels.triton.conv import configs, row_space

    config = configs.TritonConfig(*how) if how else configs.default_config(p)
    if reason := configs.why_illegal(p, config, arch):
        raise ValueError(f"{config}: {reason}")
    if not in_row_space:
        return launches.conv_bn_act(p, o, arch, config, out=out, **way)
    rows = row_space.pack(out)
    rows = rows.fill_(torch.nan) if rows.is_floating_point() else rows | 1  # the halo has to change, too
    o = o._replace(residual=None if o.residual is None else row_space.pack(o.residual))
    outcomes = launches.run_conv(p, o, rows, arch, config, **way)
    out = row_space.unpack(rows, p.N, p.P, p.Q)
    if not torch.equal(row_space.pack(out).view(torch.uint8), rows.view(torch.uint8)):
        raise ValueError(f"{p}, {config}: the halo is not zero")
    return out, outcomes


class _Watched:
    """Looks at every kernel that is loaded: how many wgmma take A from registers."""

    def __enter__(self):
        self.register_a, self.names, self._parse = 0, [], parser.parse

        def parse(*arguments):
            entry = self._parse(*arguments)
            self.register_a += wgmma_with_registers(entry)
            self.names.append(entry.name)
            return entry

        kernel.parser.parse = parse
        return self

    def __exit__(self, *_):
        kernel.parser.parse = self._parse


def wgmma_with_registers(entry) -> int:
    """A is the second operand: a descriptor of one register, or the fragment's vector."""
    products = [one for one in entry.instructions if one.op.startswith("wgmma.mma_async")]
    return sum(len(one.operands[1]) > 1 for one in products)


def _expected(p, o):
    expected = reference.conv_bn_act(p, o)
    stored = torch.float16 if p.dtype == torch.float32 else None  # products in TF32
    return expected, reference.error_bound(p, o, expected=expected, stored=stored)


def conv_cuda(problem: str, tile: int, splits: int, arch: int, number: int, instances: list) -> dict:
    from fused_resnet.emulation import cuda_launches

    p = parsed_problem(problem, "cuda")
    o = operands_of(p)
    chosen = tuple(map(tuple, instances)) or cuda_launches.INSTANCES
    out, outcomes = cuda_launches.conv_bn_act(p, o, arch, tile, splits, instances=chosen, **mode(number))
    return answer_of(out, outcomes, *_expected(p, o))


def add_relu(maker: str, dtype: str, numel: int, arch: int, number: int) -> dict:
    from fused_resnet.emulation import cuda_launches, launches

    p = AddReluProblem((numel,), True, DTYPES[dtype], "cuda")
    a, b, grad = (torch.randn(numel).to(p.dtype) for _ in range(3))
    a[0], grad[1] = torch.nan, torch.inf
    out, grad_input = (torch.full_like(a, torch.nan) for _ in range(2))
    how = mode(number)
    if maker == "triton":
        outcomes = [launches.run_add_relu(p, a, b, out, arch, **how),
                    launches.run_add_relu(p, grad, out, grad_input, arch, backward=True, **how)]  # fmt: skip
    else:
        outcomes = [cuda_launches.run_add_relu(a, b, out, arch, **how),
                    cuda_launches.run_add_relu(grad, out, grad_input, arch, backward=True, **how)]  # fmt: skip
    wanted = torch.relu((a.double() + b.double())).to(p.dtype)
    exact = torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0)) and bool(out[0].isnan())
    exact &= torch.equal(grad_input, grad.masked_fill(wanted <= 0, 0))
    return dict(exact=exact, reports=[report for outcome in outcomes for report in outcome.reports][:3])


def chain(dtype: str, shape: list, activation: str, config: list, arch: int, number: int) -> dict:
    """shape: N, C, H, W, K, L. config: [] for the first of the table."""
    from fused_resnet.emulation import launches
    from fused_resnet.kernels.triton.chain import shift
    from fused_resnet.kernels.triton.conv import row_space
    from fused_resnet.operators.describe import chain_problem
    from tests.support.chains import chain_operands, errors_of

    o = chain_operands(shape, DTYPES[dtype], seed=number)
    p = chain_problem(o, activation)
    c = shift.ChainConfig(*config) if config else shift.configs(p, arch)[0]
    rows = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual))
    with _Watched() as watched:
        *outputs, outcome = launches.run_chain(p, rows, arch, c, **mode(number))
    maps = [row_space.unpack(one, p.N, p.H, p.W) for one in outputs if one is not None]
    has_halo = all(torch.equal(row_space.pack(one), out) for one, out in zip(maps, outputs) if not one.isnan().any())
    counts = {name: getattr(outcome.counts, name) for name in ("mma", "wgmma", "bulk_copies", "cp_async")}
    worst = max(errors_of(o, activation, maps))
    return dict(worst=worst, reports=outcome.reports[:3], halo=has_halo, register_a=watched.register_a, **counts)


def affine_act(
    dtype: str, shape: list, activation: str, nchw: bool, has_residual: bool, arch: int, number: int
) -> dict:
    from fused_resnet.emulation import launches

    memory = torch.contiguous_format if nchw else torch.channels_last
    y = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=memory)
    residual = torch.randn(shape).to(y.dtype).contiguous(memory_format=memory) if has_residual else None
    K = shape[1]
    bn = (torch.randn(K), torch.randn(K), torch.randn(K), torch.rand(K) + 0.5)
    o = ConvOperands(y, y, *bn, 1e-5, None, residual)
    # an affine map is a depthwise convolution with a weight of one
    N, _, H, W = shape
    epilogue = "bn+add" if has_residual else "bn"
    p = parsed_problem(f"{N}x{K}x{H}x{W} -> {K}, 1x1 g{K} {dtype} {epilogue} {activation}", "cuda")
    expected, bound = _expected(p, o._replace(x=y.clone(), weight=torch.ones(K, 1, 1, 1, dtype=y.dtype)))
    return answer_of(y, [launches.run_affine_act(y, o, activation, arch, **mode(number))], expected, bound)


def bn_act(
    dtype: str, shape: list, activation: str, nchw: bool, has_residual: bool, training: bool, arch: int, number: int
) -> dict:
    """Statistics, forward and backward, each held against the reference."""
    from fused_resnet.emulation import launches
    from fused_resnet.kernels.triton import bn_act as kernels
    from fused_resnet.operators import mask, reference
    from fused_resnet.operators.describe import bn_act_problem

    memory = torch.contiguous_format if nchw else torch.channels_last
    x, residual, grad = (torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=memory) for _ in range(3))
    C = shape[1]
    x += 3 * torch.randn(C).view(-1, 1, 1).to(x.dtype)
    given = (None, None) if training else (torch.randn(C), torch.rand(C) + 0.5)
    o = BnActOperands(x, *given, torch.randn(C), torch.randn(C), residual if has_residual else None, 1e-5)
    p = bn_act_problem(o, activation)
    how, outcomes = mode(number), []
    mean, var, total, dot = (torch.full((C,), torch.nan) for _ in range(4))
    if training:
        outcomes += launches.run_bn_act(kernels.statistics_launches(p, x, mean, var), arch, **how)
    used = o._replace(mean=mean, var=var) if training else o
    y, grad_x, grad_residual = (torch.empty_like(x) for _ in range(3))
    bits = torch.empty(p.mask_shape, dtype=torch.uint8)
    read = bits if p.has_mask else None
    outcomes += launches.run_bn_act(kernels.forward_launches(p, used, read, y), arch, **how)
    outcomes += launches.run_bn_act(kernels.sums_launches(p, grad, used, read, total, dot), arch, **how)
    sums = (total, dot) if training else (None, None)
    outcomes += launches.run_bn_act(
        kernels.backward_launches(p, grad, used, read, *sums, grad_x, grad_residual), arch, **how
    )
    expected = reference.bn_act(p, o, grad, mask.unpacked(bits, x) if p.has_mask else None)
    bound = reference.bn_act_bound(p, o, expected, terms=520)
    grads = (grad_x, dot * torch.rsqrt(used.var + o.eps), total, grad_residual)
    actual = reference.BnAct(y, used.mean, used.var, *grads)
    worst = {
        name: ((one.double() - wanted).abs() / allowed.clamp(min=1e-300)).max().item()
        for name, one, wanted, allowed in zip(actual._fields, actual, expected, bound)
        if training or name not in ("mean", "var")
    }
    same_mask = not p.has_mask or torch.equal(bits, mask.packed(p, y))
    reports = [report for outcome in outcomes for report in outcome.reports]
    return dict(worst=max(worst.values()), of=worst, same_mask=same_mask, reports=reports[:3])


def max_pool(
    dtype: str,
    shape: list,
    window: int,
    stride: int,
    padding: int,
    activation: str,
    has_bias: bool,
    arch: int,
    number: int,
) -> dict:
    from fused_resnet.emulation import launches

    x = torch.randn(shape).to(DTYPES[dtype]).contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = torch.nan
    bias = torch.randn(shape[1]).to(x.dtype) if has_bias else None
    p = MaxPoolProblem(*shape, window, window, (stride,) * 2, (padding,) * 2, activation, has_bias, x.dtype, "cuda")
    out = torch.full(p.output_shape, torch.nan, dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    outcome = launches.run_max_pool(p, x, bias, out, arch, **mode(number))
    y = x if bias is None else x + bias.view(1, -1, 1, 1)
    wanted = torch.nn.functional.max_pool2d(y, window, stride, padding)
    wanted = {"relu": torch.relu, "relu6": torch.nn.functional.relu6, "none": lambda v: v}[activation](wanted)
    same = (out == wanted) | (out.isnan() & wanted.isnan())
    return dict(exact=bool(same.all()), reports=outcome.reports[:3])


def random_problem(seed: int, index: int, arch: int, name: str, kind: str) -> dict:
    from fused_resnet.emulation import verify
    from fused_resnet.testing import case_at

    if not verify.is_for(name, case_at(seed, index, kind=kind)):
        return dict(status="cannot run", detail="another operator's", register_a=0)
    with _Watched() as watched:
        outcome = verify.check(seed, index, arch, name, kind=kind)
    return dict(outcome._asdict(), register_a=watched.register_a)


def quantized_plan(dtype: str, arch: int, number: int) -> dict:
    """A small network frozen as for a GPU, all its kernels emulated. worst: the largest difference of its answers from
    the reference's, as a part of the largest answer."""
    import pytest

    import fused_resnet
    from fused_resnet.backends import record, triton
    from fused_resnet.emulation import launches
    from fused_resnet.freezing import calibration
    from fused_resnet.freezing import quantized as freezing
    from fused_resnet.nn import BasicBlock
    from tests.support import networks
    from tests.support.quantized import by_reference, int8_regions

    torch.manual_seed(0)
    model, x = networks.small(BasicBlock).eval(), torch.randn(1, 3, 16, 16)
    wanted = getattr(torch, dtype)
    options = dict(dtype=wanted, calibrate=[torch.randn(8, 3, 16, 16)])
    ran: list = []

    def run(problem, operands, config=None):
        out, outcomes = launches.conv_bn_act(
            problem, layout.all_channels_last(operands), arch, config, out=layout.empty_output(problem, operands.x),
            **mode(number),
        )  # fmt: skip
        ran.extend(outcomes)
        return out

    with pytest.MonkeyPatch.context() as patch:
        by_reference(patch)
        expected = fused_resnet.freeze(model, x, **options)(x)
    emulated = triton.QUANTIZED._replace(why_not=lambda problem: None, run=run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "why_not_on", lambda dtype, device: None)
        patch.setattr(freezing, "runs_in_steps", lambda draft: True)
        patch.setattr(triton, "target", lambda: (arch, 132))
        for op in ("conv_int8", "conv_float8"):
            patch.setitem(record.REGISTRY, op, {"triton": emulated})
        frozen = fused_resnet.freeze(model, x, **options)
        ran.clear()
        actual = frozen(x)
        convolutions = sum(len(region.convolutions) for region in int8_regions(frozen, x))
    worst = ((actual - expected).abs().max() / expected.abs().max()).item()
    reports = [report for one in ran for report in one.reports]
    counts = {name: sum(getattr(one.counts, name) for one in ran) for name in ("mma", "wgmma")}
    return dict(worst=worst, reports=reports[:3], convolutions=convolutions, **counts)


def gemm(arch: int, number: int, dtype: str, a_is_k_major: bool, b_is_k_major: bool, block_k: int) -> dict:
    from tests.emulation import layout_gemm

    return layout_gemm.run(arch, DTYPES[dtype], a_is_k_major, b_is_k_major, block_k, **mode(number))


def made_descriptors(arch: int, number: int) -> dict:
    from tests.emulation import descriptor_copy

    return descriptor_copy.run(arch, **mode(number))


CASES = (
    chain,
    conv_triton,
    conv_cuda,
    conv_int8,
    conv_float8,
    add_relu,
    affine_act,
    bn_act,
    max_pool,
    random_problem,
    quantized_plan,
    gemm,
    made_descriptors,
)
ASKED = {one.__name__: one for one in CASES}


def main() -> None:
    torch.manual_seed(0)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            answer = {"result": ASKED[what](**arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()[-3000:]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
