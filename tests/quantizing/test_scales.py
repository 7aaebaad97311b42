"""Scales as a file, and whose weights they are of."""

import copy
import json

import pytest
import torch
from torch import nn

from fused_resnet.quantizing import Scales
from fused_resnet.quantizing.scales import digest

FOUND = Scales({"x": (-2.1179, 2.64), "conv1": (0.0, 1.0 / 3)}, "0123abcd", 16)


def test_a_file_gives_them_back(tmp_path):
    path = tmp_path / "inside" / "r20.json"
    assert FOUND.save(path) == path
    assert Scales.load(path) == Scales.load(str(path)) == FOUND
    record = json.loads(path.read_text())
    assert record["ranges"]["conv1"] == [0.0, 1 / 3] and record["images"] == 16
    assert (record["torch"], record["weights_sha256"]) == (torch.__version__, "0123abcd")


def test_files_of_others_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*Make one with"):
        Scales.load(tmp_path / "none.json")
    path = FOUND.save(tmp_path / "scales.json")
    record = json.loads(path.read_text())
    for broken in (
        "{", "[]", json.dumps({**record, "format": "other"}), json.dumps({**record, "ranges": {"x": [1]}}),
        json.dumps({**record, "ranges": {"x": [1, 0]}}), json.dumps({**record, "ranges": {"x": [0, float("nan")]}}),
        json.dumps({name: value for name, value in record.items() if name != "images"}),
    ):  # fmt: skip
        path.write_text(broken)
        with pytest.raises(ValueError, match="scales.json is not what"):
            Scales.load(path)


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
