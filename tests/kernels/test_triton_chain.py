"""The kernel of bottleneck_chain against the fp64 reference: on the GPU where there is one, else in the interpreter."""

import pytest
import torch

from fused_resnet.choosing import choice
from fused_resnet.kernels.triton import runtime
from fused_resnet.kernels.triton.chain import shift
from fused_resnet.kernels.triton.chain.shift import ChainConfig
from fused_resnet.kernels.triton.conv import row_space
from fused_resnet.operators.describe import chain_problem
from fused_resnet.operators.problem import ACTIVATIONS, ChainProblem
from tests.kernels.test_triton import DEVICE, needs_triton
from tests.support.chains import chain_operands, errors_of

pytestmark = needs_triton
needs_tma = pytest.mark.skipif(
    not runtime.INTERPRETED and runtime.arch(torch.device(DEVICE)) < 90, reason="TMA needs a GPU of sm_90 or later"
)
FORMS = (pytest.param(ChainConfig(64, 32, 4, 2, True), marks=needs_tma), ChainConfig(64, 32, 4, 2, False))
forms = pytest.mark.parametrize("config", FORMS, ids=("tma", "pointers"))
# N, C, H, W, K, L: tiles of rows, of channels and of expanded channels, all ragged
SHAPES = ((2, 32, 5, 7, 80, 48), (3, 16, 9, 3, 32, 0), (1, 48, 7, 11, 48, 16))


def launched(o, activation, config):
    """(y, reduced), in row space, with poison before, in and behind them."""
    problem = chain_problem(o, activation)
    o = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual)).map(lambda t: t.to(DEVICE))
    M, guard = row_space.num_rows(problem.N, problem.H, problem.W), 64
    memories = [torch.full((2 * guard + M * size,), torch.nan, dtype=problem.dtype, device=DEVICE)
                for size in (problem.K, problem.L)]  # fmt: skip
    outputs = [memory[guard : memory.numel() - guard].view(M, -1) if memory.numel() > 2 * guard else None
               for memory in memories]  # fmt: skip
    each = shift.prepare(problem, o, *outputs, config)
    runtime.start(*each, like=outputs[0])
    for memory in memories:
        assert memory[:guard].isnan().all() and memory[-guard:].isnan().all(), "written out of bounds"
    return [None if one is None else one.cpu() for one in outputs]


def check(o, activation, config):
    N, _, H, W = o.x.shape
    maps = []
    for rows in launched(o, activation, config):
        if rows is not None:
            maps.append(row_space.unpack(rows, N, H, W))
            halo = rows.view(N, H + 1, W + 1, -1).clone()
            halo[:, :H, :W] = 0
            assert not halo.any(), "the halo is not zero"
    assert max(errors_of(o, activation, maps)) <= 1
    return maps


@forms
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, dtype, config):
    check(chain_operands(shape, dtype), "relu", config)


@forms
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, config):
    maps = check(chain_operands(SHAPES[0], torch.float16), activation, config)
    for out in maps:
        reached = {"none": out.min() < -1, "relu": out.min() == 0, "relu6": out.min() == 0, "silu": (out < 0).any()}
        assert reached[activation]


@forms
@pytest.mark.parametrize("size", ((1, 1), (1, 9), (9, 1), (2, 2)), ids=str)
def test_maps_as_small_as_the_filter(size, config):
    check(chain_operands((3, 16, *size, 32, 16), torch.float16), "relu", config)


@forms
def test_a_bad_pixel_stays_in_its_image_and_window(config):
    o = chain_operands(SHAPES[0], torch.float16)
    for h, w in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        x = o.x.clone()
        x[1, :, h, w] = torch.nan
        for rows in launched(o._replace(x=x), "relu", config):
            out = row_space.unpack(rows, *o.x.shape[:1], *o.x.shape[2:])
            reached = torch.zeros(2, 5, 7, dtype=torch.bool)
            reached[1, max(h % 5 - 1, 0) : h % 5 + 2, max(w % 7 - 1, 0) : w % 7 + 2] = True
            assert torch.equal(out.isnan().all(1), reached) and torch.equal(out.isnan().any(1), reached)


PROBLEM = ChainProblem(1, 64, 9, 9, 256, 64, "relu", torch.float16, "cpu")


def test_what_it_does_not_take_and_why():
    assert shift.why_not(PROBLEM) is None or not runtime.INTERPRETED
    for changes, words in (
        (dict(C=40), "channels must be multiples of 16, not 40, 256 and 64"),
        (dict(K=250), "channels must be multiples of 16, not 64, 250 and 64"),
        (dict(L=8), "channels must be multiples of 16, not 64, 256 and 8"),
        (dict(C=512), "a program holds 256 channels of x and 256 of the reduction at most, not 512 and 64"),
        (dict(L=272), "256 of the reduction at most, not 64 and 272"),
        (dict(N=2**25), "rows with their halo are too many"),
        (dict(dtype=torch.float32), "float32 is not supported (float16, bfloat16 are)"),
    ):  # fmt: skip
        assert words in shift.why_not(PROBLEM._replace(**changes)), changes


def test_configs_are_those_that_hold_the_channels():
    for C, L in ((16, 0), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256)):
        problem = PROBLEM._replace(C=C, L=L)
        with_tma, without = shift.configs(problem, 90), shift.configs(problem, 80)
        assert with_tma[0].tma and not any(config.tma for config in without) and set(without) < set(with_tma)
        assert shift.default_config(problem) == without[0]
    # what 64 channels can be held by in fewer warps, 256 cannot
    assert shift.configs(PROBLEM, 90)[0] not in shift.configs(PROBLEM._replace(C=256), 90)


def test_a_config_that_is_not_in_the_table_is_refused():
    o = chain_operands(SHAPES[0], torch.float16)
    problem = chain_problem(o, "relu")
    y = torch.empty(row_space.num_rows(2, 5, 7), 80, dtype=torch.float16)
    with pytest.raises(ValueError, match="is not for 2x32x5x7 -> 80 -> 48 chain float16 relu: known are"):
        shift.launch(problem, o, y, None, ChainConfig(32, 32, 4, 2, True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_backend_copies_maps_into_row_space_and_back(shape):
    o = chain_operands(shape, torch.bfloat16)
    unaligned = torch.empty(o.x.numel() + 1, dtype=o.x.dtype)[1:].view(o.x.shape).copy_(o.x)  # in NCHW, 2 bytes off
    for operands in (o, o._replace(x=unaligned)):
        outputs = torch.ops.fused_resnet.bottleneck_chain(*operands.map(lambda t: t.to(DEVICE)), "relu", "triton")
        outputs = [one.cpu() for one in outputs]
        assert max(errors_of(o, "relu", outputs)) <= 1
        for one, other in zip(outputs, torch.ops.fused_resnet.bottleneck_chain(*o, "relu", "eager")):
            assert (one.shape, one.stride()) == (other.shape, other.stride())


@needs_tma
def test_weights_that_tma_cannot_read_are_read_by_pointers():
    o = chain_operands(SHAPES[0], torch.float16)
    o = o._replace(x=row_space.pack(o.x), residual=row_space.pack(o.residual)).map(lambda t: t.to(DEVICE))
    problem = ChainProblem(*SHAPES[0], "relu", torch.float16, DEVICE)
    outputs = [torch.full((row_space.num_rows(2, 5, 7), size), torch.nan).half().to(DEVICE) for size in (80, 48)]
    moved = torch.empty(o.weight.numel() + 1, dtype=o.weight.dtype, device=DEVICE)[1:]
    moved = moved.as_strided(o.weight.shape, o.weight.stride()).copy_(o.weight)
    shift.launch(problem, o._replace(weight=moved), *outputs, shift.configs(problem, 90)[0])
    assert not any(one.isnan().any() for one in outputs)


def test_auto_never_takes_it():
    """Nothing has been measured of it. By its name it runs."""
    for device in ("cpu", "cuda"):
        selected = choice.select(PROBLEM._replace(device=device))
        assert selected.backend.name == "eager" and selected.source == choice.FIXED_ORDER
