"""Scales as a file, and whose weights they are of."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_resnet.freezing.trace import trace
from fused_resnet.quantizing import Scales
from fused_resnet.quantizing.scales import Effect, digest, digest_of_steps

FOUND = Scales({"x": (-2.1179, 2.64), "conv1": (0.0, 1.0 / 3)}, "0123abcd", 16)


def test_a_file_gives_them_back(tmp_path):
    path = tmp_path / "inside" / "r20.json"
    assert FOUND.save(path) == path
    assert Scales.load(path) == Scales.load(str(path)) == FOUND
    record = json.loads(path.read_text())
    assert record["ranges"]["conv1"] == [0.0, 1 / 3] and record["images"] == 16
    assert (record["torch"], record["weights_sha256"]) == (torch.__version__, "0123abcd")


def test_effects_are_kept(tmp_path):
    found = FOUND._replace(effects={"conv1": Effect(31.5, 0.001), "conv2": Effect(None, 0.0)})
    assert Scales.load(found.save(tmp_path / "scales.json")) == found


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*Make one with"):
        Scales.load(tmp_path / "none.json")
    path = FOUND.save(tmp_path / "scales.json")
    record = json.loads(path.read_text())
    for broken in (
        "{", "[]", json.dumps({**record, "format": "other"}), json.dumps({**record, "ranges": {"x": [1]}}),
        json.dumps({**record, "ranges": {"x": [1, 0]}}), json.dumps({**record, "ranges": {"x": [0, float("nan")]}}),
        json.dumps({**record, "effects": {"x": [1, 2]}}),
        json.dumps({**record, "effects": {"x": {"sqnr_db": 30, "clipped": 1.5}}}),
        json.dumps({name: value for name, value in record.items() if name != "images"}),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ValueError, match="scales.json is not what"):
            Scales.load(path)


def test_a_file_of_an_older_version_says_nothing_of_steps(tmp_path):
    path = FOUND._replace(steps="89ab").save(tmp_path / "scales.json")
    record = json.loads(path.read_text())
    assert Scales.load(path).steps == record.pop("steps_sha256") == "89ab" and record.pop("effects") == {}
    path.write_text(json.dumps({**record, "format": "fused_resnet scales 1"}))
    assert Scales.load(path) == FOUND


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.parametrize("layout", (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr))
def test_sparse_buffers_have_digests(layout):
    model = nn.Identity()
    dense = torch.eye(4)
    options = {"blocksize": (2, 2)} if layout == torch.sparse_bsr else {}
    found = []
    for change in (0.0, 1.0):
        dense[0, 1] += change
        model.adjacency = nn.Buffer(dense.to_sparse(layout=layout, **options))
        found.append(digest(model))
        assert digest(model) == found[-1]
    assert found[0] != found[1]


class Steps(nn.Module):
    def __init__(self, stride=1, activation=F.relu, inplace=False, scale=2.0, swaps=False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, stride, 1), nn.Conv2d(3, 3, 3, 1, 1)
        self.last, self.activation, self.scale, self.swaps = nn.ReLU(inplace), activation, scale, swaps

    def forward(self, x):
        first, second = (self.b, self.a) if self.swaps else (self.a, self.b)
        return self.last(second(self.activation(first(x)) * self.scale))


def test_a_digest_of_steps_is_of_what_is_done_with_the_weights():
    own = digest_of_steps(trace(Steps().eval()))
    assert digest_of_steps(trace(Steps().eval())) == own  # of other weights
    for other in (Steps(2), Steps((1, 2)), Steps(activation=F.relu6), Steps(scale=3.0), Steps(swaps=True)):
        assert digest_of_steps(trace(other.eval())) != own, other


def test_a_digest_is_of_names_shapes_and_values():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    own = digest(model)
    assert digest(copy.deepcopy(model)) == own
    counted = copy.deepcopy(model)
    counted[1].num_batches_tracked += 1
    assert digest(counted) == own
    for name, change in (
        ("0.weight", lambda t: t.view(-1)[5:6].mul_(1.0000001)),
        ("1.running_mean", lambda t: t.add_(1e-7)),
    ):
        other = copy.deepcopy(model)
        with torch.no_grad():
            change(other.state_dict()[name])
        assert digest(other) != own, name
    assert digest(copy.deepcopy(model).bfloat16()) != own
    assert digest(nn.Sequential(model)) != own
