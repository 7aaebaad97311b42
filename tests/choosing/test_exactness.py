"""The check of int8 regions: one value that differs is an error, and what is found is kept."""

import re

import pytest
import torch

from fused_resnet.backends import BackendError
from fused_resnet.choosing import exactness, winners
from fused_resnet.choosing.decide import NOTHING, Tuning
from fused_resnet.operators import quantized
from fused_resnet.operators.describe import conv_problem
from fused_resnet.operators.operands import ConvOperands
from fused_resnet.operators.quantized import Quantized
from fused_resnet.regions import kernels
from fused_resnet.regions.exact import run_reference
from fused_resnet.regions.fragment import ConvStep, Fragment

ON = Tuning("auto")


@pytest.fixture(autouse=True)
def checking(tuned_files, monkeypatch):
    monkeypatch.delenv("FUSED_RESNET_TUNE")


class Region:
    """What a compiled region is to the check: here the reference, and what `spoil` makes of its outputs and inputs."""

    def __init__(self, N=3, spoil=lambda outputs, inputs: None, scale=0.02, is_signed=True):
        x, weight = torch.empty(N, 4, 6, 5, device="meta"), torch.randn(8, 4, 3, 3)
        problem = conv_problem(ConvOperands(x, weight.to("meta")), (1, 1), (1, 1), (1, 1), 1, "relu")
        step = ConvStep(problem._replace(dtype=torch.int8, device="cpu"), 0)
        scales = Quantized(scale, is_signed), Quantized(0.03, False)
        self.fragment = Fragment((tuple(x.shape),), (step,), (1,), torch.int8, scales)
        q, of_weight = quantized.quantized_weight(weight)
        self.weights, self.epilogues = (
            {0: q},
            {0: quantized.epilogue_of(scales[0], of_weight, scales[1], None, None, "relu")},
        )
        self.spoil, self.batches = spoil, []

    def empty_workspace(self):
        return torch.empty(8, dtype=torch.uint8)

    def __call__(self, inputs, workspace, kernel):
        assert workspace.tolist() == [0xFF] * 8
        self.batches.append(inputs[0].clone())
        outputs = run_reference(self.fragment, self.weights, self.epilogues, inputs)
        self.spoil(outputs, inputs)
        return outputs

    def check(self, tuning=ON):
        exactness.check(self.fragment, self.weights, self.epilogues, self, tuning)


def test_what_is_right_is_checked_once_with_either_image_at_each_place():
    region = Region()
    region.check()
    first, second = region.batches
    assert not torch.equal(first[0], first[1]) and torch.equal(first[1], second[0]) and torch.equal(first[0], second[1])
    region.check()
    assert len(region.batches) == 2
    other = Region(N=1)
    other.check()
    assert len(other.batches) == 2


def test_values_beyond_the_scale_are_among_them():
    region = Region()
    region.check()
    limit = 0.02 * 127
    assert region.batches[0].abs().amax((1, 2, 3)).gt(limit).any() and region.batches[0].abs().median() < limit


@pytest.mark.parametrize("image", range(3))
def test_one_value_that_differs_is_an_error(image):
    def spoil(outputs, inputs):
        outputs[0][image, 7, 5, 4] += 0.03

    region = Region(spoil=spoil)
    match = (
        "is wrong on this machine: 1 of 720 values of output 0 differ from the reference, in a 3x.*FUSED_RESNET_CPU_ISA"
    )
    for _ in range(2):  # the second time it is known
        with pytest.raises(BackendError, match=match):
            region.check()
    assert len(region.batches) == 1
    region.check(NOTHING)  # with tune=False nothing is asked


def test_nan_is_an_error():
    with pytest.raises(BackendError, match="1 of 720 values"):
        Region(spoil=lambda outputs, inputs: outputs[0][0, 0, 0, :1].fill_(torch.nan)).check()


def test_a_write_into_the_input_is_an_error():
    with pytest.raises(BackendError, match="it writes into its input"):
        Region(spoil=lambda outputs, inputs: inputs[0][0, 0, 0, :1].add_(1)).check()


def test_what_raises_is_an_error_but_for_want_of_memory(tuned_files):
    def raising(error, **options):
        def spoil(outputs, inputs):
            raise error

        return Region(spoil=spoil, **options)

    with pytest.raises(BackendError, match="wrong on this machine: .*no such step"):
        raising(RuntimeError("no such step")).check()
    kept = tuned_files.path(tuned_files.user)
    assert not kept.exists() or "no such step" not in kept.read_text()
    raising(torch.OutOfMemoryError("out of memory"), N=1).check()


def test_a_check_speaks_for_all_scales(tuned_files):
    Region().check()
    kept = tuned_files.path(tuned_files.user).read_text()
    other = Region(scale=0.0123)
    other.check()
    assert not other.batches and tuned_files.path(tuned_files.user).read_text() == kept
    unsigned = Region(is_signed=False)
    unsigned.check()
    assert len(unsigned.batches) == 2


def test_it_is_kept_by_kernel(monkeypatch):
    region = Region()
    region.check()
    monkeypatch.setattr(kernels, "fastest_name", lambda dtype: "another")
    region.check()
    assert len(region.batches) == 4


def test_nothing_is_checked_where_measurements_do_not_count(monkeypatch):
    region = Region()
    with winners.ignored():
        region.check()
    monkeypatch.setenv("FUSED_RESNET_TUNE", "0")
    region.check()
    assert not region.batches


def test_the_text_says_what_it_is():
    found = []
    Region().check(Tuning("auto", lambda fraction, text: found.append(text)))
    assert re.match(
        "checking a 3xregion of 1 convolutions, 4x6x5 to 8x6x5 int8, [0-9a-f]{16}, ends [0-3] by ", found[0]
    )
