"""What a table of measurements says: losses, and who is held against whom."""

import math

import pytest

from fused_resnet import measuring


def test_summary_lists_every_loss():
    def row(problem, count, base, ours):
        variants = {"base": {"median_us": base}, "ours": {"median_us": ours}}
        return {"problem": problem, "count": count, "variants": variants}

    rows = [row("win", 1, 40.0, 10.0), row("loss", 2, 10.0, 40.0), row("even", 1, 10.0, 10.0)]
    (entry,) = measuring.summarise(rows, "base")
    assert entry["share_won"] == pytest.approx(1 / 3)  # what is level is neither won nor lost
    assert entry["geomean_speedup"] == pytest.approx(1.0)
    assert (entry["worst_problem"], entry["worst_speedup"]) == ("loss", 0.25)
    assert (entry["total_us"], entry["total_us_against"]) == (100.0, 70.0)
    assert entry["losses"] == [{"problem": "loss", "speedup": 0.25}]


def op_row(batch=32, device="cuda", auto="cudnn", **times):
    variants = {{"folded": measuring.FOLDED}.get(name, name): {"median_us": us} for name, us in times.items()}
    return {"op": "conv_bn_act", "device": device, "batch": batch, "dtype": "fp16", "auto": auto, "count": 1,
            "problem": f"{batch}, {sorted(times.items())}", "variants": variants}  # fmt: skip


def test_our_kernels_are_held_against_the_better_of_cudnn_fused_and_unfused():
    """The libraries' kernels are nobody's but theirs, the fastest of ours counts, and large batches stand apart."""
    rows = [
        op_row(unfused=9.0, folded=4.0, cudnn=8.0, cublaslt=0.5, triton=2.0, cuda=3.0),  # 4 / 2
        op_row(unfused=9.0, folded=9.0, cudnn=8.0, triton=16.0, auto="triton"),  # 8 / 16
        op_row(batch=1, unfused=9.0, folded=3.0, triton=1.0, auto="eager"),  # 3 / 1
        op_row(device="cpu", batch=1, unfused=9.0, folded=4.0, onednn=2.0, winograd=1.0, auto="onednn"),
    ]
    summary = {(entry["variant"], entry["where"]): entry for entry in measuring.summarise_ops(rows)
               if entry["variant"] in (measuring.OURS, measuring.AUTO)}  # fmt: skip
    ours, large = summary[measuring.OURS, "all"], summary[measuring.OURS, "batch >= 32"]
    assert ours["problems"] == 3 and ours["geomean_speedup"] == pytest.approx((2 * 0.5 * 3) ** (1 / 3))
    assert large["geomean_speedup"] == pytest.approx(1.0) and large["share_won"] == 0.5
    assert [loss["speedup"] for loss in large["losses"]] == [0.5]
    # against the fastest library kernel: 0.5 / 8 with cuBLASLt, 8 / 16, its own folded eager, its own oneDNN
    auto = summary[measuring.AUTO, "all"]
    assert auto["geomean_speedup"] == pytest.approx((0.0625 * 0.5 * 1 * 1) ** 0.25) and len(auto["losses"]) == 2


def test_a_network_is_held_against_the_fastest_rival_of_its_own_dtype():
    times = {"eager NCHW fp32": 90.0, "compile fp32": 30.0, "cudnn fp32": 20.0, "frozen fp32": 25.0,
             "compile bf16": 8.0, "frozen bf16": 4.0, "fused bf16": 10.0}  # fmt: skip
    variants = {name: {"median_us": us} for name, us in times.items()}
    assert measuring.rival_of("frozen fp32", variants) == ("cudnn fp32", 0.8)
    assert measuring.rival_of("compile fp32", variants) == ("", math.inf)
    summary = measuring.summarise_networks([{"problem": "a net", "variants": variants}])
    found = {(entry["variant"], entry["against"]): entry["geomean_speedup"] for entry in summary}
    assert found["frozen fp32", "the best of compile, cudnn in fp32"] == pytest.approx(0.8)
    assert found["frozen bf16", "the best of compile in bf16"] == pytest.approx(2.0)
    assert found["fused bf16", "eager NCHW fp32"] == pytest.approx(9.0) and len(found) == 6
