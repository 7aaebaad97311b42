"""Agreement of two models on images: counted by hand."""

import math

import pytest
import torch
from torch import nn

import fused_resnet


class Fixed(nn.Module):
    """The logits of images that are numbers of rows."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows)

    def forward(self, x):
        return self.rows[x[:, 0].long()]


# six classes, so that the last of five is left out
SORTED = [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
EXACT = Fixed([SORTED, SORTED, SORTED, SORTED[::-1]])
FAST = Fixed([SORTED, [5.0, 6.0, *SORTED[2:]], SORTED, SORTED[::-1]])
X = torch.arange(4.0).view(4, 1)
LABELS = torch.tensor([0, 1, 5, 0])  # likeliest; second; last; last of the reversed


def test_by_hand():
    seen = []
    found = fused_resnet.agreement(EXACT, FAST, [(X[:3], LABELS[:3]), [X[3:], LABELS[3:]]], progress=seen.append)
    assert (found.images, found.top1, found.top5) == (4, 0.25, 0.5)
    assert (found.fast_top1, found.fast_top5, found.changed) == (0.5, 0.5, 1)
    energy = 4 * sum(value**2 for value in SORTED)
    assert found.sqnr_db == pytest.approx(10 * math.log10(energy / 2))
    assert found.drop == -25 and seen == [3, 4]
    text = (
        "4 images, top-1 25.00 % and 50.00 %, top-5 50.00 % and 50.00 %, 1 predictions changed (25.00 %), SQNR 22.6 dB"
    )
    assert str(found) == text


def test_without_labels():
    found = fused_resnet.agreement(EXACT, EXACT, [X])
    assert found == (4, None, None, None, None, 0, math.inf) and found.drop is None
    assert str(found) == "4 images, 0 predictions changed (0.00 %), SQNR inf dB"


def test_few_classes_are_all_among_five():
    few = Fixed([[1.0, 2.0]] * 4)
    assert fused_resnet.agreement(few, few, [(X, LABELS % 2)]).top5 == 1.0


def test_refusals():
    for error, match, model, loader in (
        (ValueError, "the loader holds no images", EXACT, []),
        (ValueError, "3 of 4 images have labels; all must, or none", EXACT, [(X[:3], LABELS[:3]), X[3:]]),
        (ValueError, r"model must return logits .* for N=4, got \(4, 6, 1\)", lambda x: EXACT(x)[..., None], [X]),
        (ValueError, "for N=4, got list", lambda x: [x], [X]),
        (TypeError, "agreement: batch 0 is a str", EXACT, ["x"]),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            fused_resnet.agreement(model, FAST, loader)


def test_no_gradients_are_kept():
    model = nn.Linear(1, 6)
    kept = []
    fused_resnet.agreement(lambda x: kept.append(model(x)) or kept[-1], FAST, [X])
    assert not kept[0].requires_grad
