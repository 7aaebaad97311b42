"""Copies, pickles, averages, state dicts and other parameters of fused models."""

import copy
import io
import pickle

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_resnet
from fused_resnet.fusing import convert
from fused_resnet.nn import BasicBlock, Bottleneck
from tests.support import networks
from tests.support.fused import TOLERANCE, as_good_as_plain, assert_same, fused_blocks, pair


@pytest.mark.parametrize("backend", ("auto", "eager"))
@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_copies_pickles_and_averages_stay_fused(block, backend):
    plain = networks.small(block)
    fused, x = fused_resnet.fuse(copy.deepcopy(plain), backend=backend), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = fused(x)
    saved = io.BytesIO()
    torch.save(fused, saved)
    saved.seek(0)
    ema = AveragedModel(fused, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    ema.update_parameters(fused)
    copies = {
        "deepcopy": copy.deepcopy(fused),
        "pickle": pickle.loads(pickle.dumps(fused)),
        "torch.save": torch.load(saved, weights_only=False),
        "EMA": ema.module,
    }
    for name, model in copies.items():
        assert [one.backend for one in fused_blocks(model)] == [backend] * 4, name
        assert convert.fused_convs(model) == convert.fused_convs(fused), name
        with torch.no_grad():
            assert torch.equal(model(x), expected), name
        assert_same(model(x), plain(x))
        assert type(fused_resnet.unfuse(model)) is type(plain), name
        assert {type(module) for module in networks.blocks_of(model)} == {block}, name
    assert len(fused_blocks(fused)) == 4 and convert.fused_convs(fused)  # and the copies are copies


@pytest.mark.parametrize("block", (BasicBlock, Bottleneck))
def test_state_dict_goes_both_ways(block):
    plain, fused, x = pair(block)
    other = networks.small(block)
    with torch.no_grad():
        fused(x)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(other.state_dict())
    as_good_as_plain(fused, other, x)
    assert_same(fused(x), other(x))
    plain.load_state_dict(fused.state_dict())
    assert_same(plain(x), other(x))


def test_functional_call_reads_the_given_parameters():
    plain, fused, x = pair()
    other = {name: value * 1.1 for name, value in plain.state_dict().items() if value.is_floating_point()}
    expected = torch.func.functional_call(plain, other, (x,))
    assert_same(torch.func.functional_call(fused, other, (x,)), expected)
    assert not torch.allclose(expected, plain(x), **TOLERANCE)


def test_functional_call_reads_another_models_state():
    _, fused, x = pair(BasicBlock)
    other = networks.small()
    with torch.no_grad():
        actual = torch.func.functional_call(fused, dict(other.state_dict()), (x,))
        assert networks.error(actual, other(x).double()) < 1e-5
        assert networks.error(fused(x), other(x).double()) > 1e-2
