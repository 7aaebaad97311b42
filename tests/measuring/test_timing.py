"""Timing with callables whose duration is known, the environment record, atomic JSON, and provenance."""

import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

import fused_resnet
from fused_resnet import backends, measuring, models
from fused_resnet.freezing import modules
from fused_resnet.kernels import sources
from fused_resnet.kernels.triton import cache_read, runtime
from fused_resnet.machine import files
from fused_resnet.measuring import environment, rooflines, timing, verified
from fused_resnet.operators.problem import AddReluProblem, ConvProblem

SMALL = ConvProblem(4, 8, 6, 5, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, "relu", False, True, True, torch.float32, "cpu")


class FakeClock:
    """perf_counter and monotonic in one; callables advance it."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 100.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "monotonic", lambda: self.now)

    def taking(self, name, *seconds):
        remaining = list(seconds)

        def call():
            self.calls.append(name)
            self.now += remaining.pop(0) if len(remaining) > 1 else remaining[0]

        return call


@pytest.fixture
def clock(monkeypatch):
    return FakeClock(monkeypatch)


def test_stats_of_known_times():
    stats = timing.Stats.of([float(us) for us in reversed(range(11))])
    assert stats == timing.Stats(median_us=5.0, min_us=0.0, p10=1.0, p90=9.0, samples=11)
    assert timing.Stats.of([7.0]) == timing.Stats(7.0, 7.0, 7.0, 7.0, 1)


def test_interleaved_measures_each_callable(clock):
    variants = {"fast": clock.taking("fast", 0.001), "slow": clock.taking("slow", 0.5, 0.004, 0.002, 0.003)}
    stats = timing.interleaved(variants, rounds=3, warmup=1)  # the first call, 0.5 s, is the warm-up
    assert stats["fast"].median_us == pytest.approx(1000)
    assert stats["slow"].median_us == pytest.approx(3000)
    assert (stats["slow"].min_us, stats["slow"].samples) == (pytest.approx(2000), 3)


def test_rounds_start_one_variant_later_each_time(clock):
    timing.interleaved({name: clock.taking(name, 0.001) for name in "abc"}, rounds=3, warmup=0)
    assert "".join(clock.calls) == "abc" + "bca" + "cab"


def test_budget_ends_the_rounds_after_the_least_number(clock):
    stats = timing.interleaved({"a": clock.taking("a", 1.0)}, budget_s=10, warmup=0)
    assert stats["a"].samples == 10
    stats = timing.interleaved({"a": clock.taking("a", 100.0)}, budget_s=1, warmup=0)
    assert stats["a"].samples == timing.MIN_ROUNDS


def test_rounds_are_a_ceiling_beside_a_budget(clock):
    assert timing.interleaved({"a": clock.taking("a", 1.0)}, budget_s=10, rounds=4, warmup=0)["a"].samples == 4


def test_progress_rises_to_one(clock):
    seen = []
    timing.interleaved({"a": clock.taking("a", 1.0)}, rounds=4, warmup=0, progress=lambda f, text: seen.append(f))
    assert seen == [0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(
    "variants, limits, message",
    [
        ({}, {"rounds": 1}, "nothing to time"),
        ({"a": None}, {}, "rounds, budget_s or both"),
        ({"a": None}, {"rounds": 0}, "rounds=0"),
        ({"a": None}, {"budget_s": -1.0}, "budget_s=-1.0"),
    ],
)
def test_interleaved_refuses(variants, limits, message):
    with pytest.raises(ValueError, match=message):
        timing.interleaved(variants, **limits)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [False, True])
def test_interleaved_on_cuda_sees_the_longer_kernel(graphs):
    small, large = (torch.randn(n, n, device="cuda") for n in (256, 8192))
    stats = timing.interleaved(
        {"small": lambda: small @ small, "large": lambda: large @ large}, device="cuda", rounds=5, graphs=graphs
    )
    assert stats["large"].median_us > 5 * stats["small"].median_us > 0


def test_roofline_is_the_larger_of_memory_and_arithmetic():
    memory_bound = rooflines.Roofline(bytes_per_s=SMALL.bytes_moved * 10.0, flops_per_s=1e30)
    assert memory_bound.time_us(SMALL) == pytest.approx(1e5)
    assert memory_bound.time_us(AddReluProblem((4, 4), True, torch.float32, "cpu")) == pytest.approx(
        1e5 * 3 * 16 * 4 / SMALL.bytes_moved
    )
    compute_bound = rooflines.Roofline(bytes_per_s=1e30, flops_per_s=SMALL.flops * 100.0)
    assert compute_bound.time_us(SMALL) == pytest.approx(1e4)


# ------------------------------------------------------------------------------------------------------- environment


def test_environment_names_what_matters_and_no_place():
    record = environment.environment()
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert {"date", "cpu", "cpu_flags", "cores", "python", "triton", "gpu", "commit", "dirty"} <= set(record)
    import socket

    text = json.dumps(record)
    assert socket.gethostname() not in text and str(sources.ROOT) not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_being_written_is_no_change_of_the_code(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    git("init")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "fused_resnet" / "measuring" / "environment.py"))
    assert environment.environment()["dirty"] is False
    files.write_json(tmp_path / "benchmarks" / "results" / "cpu" / "model.json", {})
    assert environment.environment()["dirty"] is False
    files.write_json(tmp_path / "benchmarks" / "new.json", {})
    assert environment.environment()["dirty"] is True


def test_write_json_replaces_whole_files(tmp_path):
    file = files.write_json(tmp_path / "deep" / "a.json", {"x": 1})
    files.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 2} and [f.name for f in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = files.write_json(tmp_path / "a.json", {"x": 1})

    def interrupted(*_):
        raise error

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(error):
        files.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 1} and [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": math.nan})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ subjects


def test_op_variants_are_right_and_say_why_others_are_missing():
    found, skipped = measuring.op_variants(SMALL, measuring.random_operands(SMALL, "cpu"))
    assert {measuring.UNFUSED, measuring.FOLDED, "onednn"} <= set(found)
    assert "NVIDIA" in skipped["cudnn"]
    for name, prepared in found.items():
        assert 0 < measuring.error_ratio(prepared) <= 1, name


def measured(problem=SMALL):
    """One row of `bench ops`."""
    subject = measuring.OperatorSubject(problem, {"a model": 2}, "cpu")
    return {"problem": subject.name, **subject.measured(0.01, rounds=1)}


def with_bound(monkeypatch, change):
    """FrozenConv's calls, changed by change(output); eager is not a FrozenConv."""
    bound = modules.FrozenConv.bound

    def changed(self):
        call = bound(self)
        return lambda x, residual=None: change(call(x, residual))

    monkeypatch.setattr(modules.FrozenConv, "bound", changed)


def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch):
    def wrong_in_the_last_image(out):
        out = out.clone()
        out[-1, -1, -1, -1] += 0.01
        return out

    with_bound(monkeypatch, wrong_in_the_last_image)
    assert backends.known("conv_bn_act")["onednn"].why_not(SMALL) is None
    row = measured()
    wrong = {entry["variant"]: entry for entry in measuring.mismatches([row])}
    assert wrong["onednn"]["error_ratio"] > 1 and wrong["onednn"]["raised"] is None
    assert "onednn" not in row["variants"] and measuring.FOLDED in row["variants"]


def test_a_kernel_that_raises_costs_the_others_nothing(monkeypatch):
    def broken(out):
        raise RuntimeError("illegal address\nmore")

    with_bound(monkeypatch, broken)
    row = measured()
    wrong = {entry["variant"]: entry for entry in measuring.mismatches([row])}
    assert wrong["onednn"] == {
        "problem": str(SMALL), "variant": "onednn", "error_ratio": None, "raised": "RuntimeError: illegal address",
    }  # fmt: skip
    assert "onednn" not in row["variants"] and measuring.FOLDED in row["variants"]


def test_an_addition_has_one_right_answer(monkeypatch):
    problem = AddReluProblem((3, 5, 7, 2), True, torch.bfloat16, "cpu")
    found, _ = measuring.add_relu_variants(problem, "cpu")
    assert {measuring.UNFUSED, measuring.FOLDED, measuring.COPY, "cpu"} <= set(found)
    assert all(measuring.error_ratio(one) == 0 for one in found.values())
    right = found["cpu"].run()
    wrong = right.clone()
    wrong[-1, -1, -1, -1] = right.max() * (1 + 2**-7)  # the next number up
    assert measuring.error_ratio(found["cpu"]._replace(run=lambda: wrong)) == math.inf


def test_a_kernel_that_writes_nan_counts_as_infinitely_wrong(monkeypatch):
    found, _ = measuring.op_variants(SMALL, measuring.random_operands(SMALL, "cpu"))
    broken = found["onednn"]._replace(run=lambda: torch.full(SMALL.output_shape, math.nan))
    assert measuring.error_ratio(broken) == math.inf


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
    summary = measuring.summarise_networks(
        [{"problem": "a net", "variants": variants}], ("compile", "cudnn", "tensorrt")
    )
    found = {(entry["variant"], entry["against"]): entry["geomean_speedup"] for entry in summary}
    assert found["frozen fp32", "the best of compile, cudnn in fp32"] == pytest.approx(0.8)
    assert found["frozen bf16", "the best of compile in bf16"] == pytest.approx(2.0)
    assert found["fused bf16", "eager NCHW fp32"] == pytest.approx(9.0) and len(found) == 6


def test_cudnn_is_stitched_in_where_it_fits(monkeypatch):
    """cuDNN's place is taken here by a backend that, like it, runs only what ends in a ReLU."""
    calls = []

    def run(problem, operands):
        calls.append(problem)
        return backends.known("conv_bn_act")["eager"].run(problem, operands)

    fitting = backends.Backend("stitched", lambda p: None if p.activation == "relu" else f"not {p.activation}", run)
    monkeypatch.setitem(backends.known.__globals__["REGISTRY"]["conv_bn_act"], "stitched", fitting)
    model, x = measuring.calibrated(models.create("resnet20", option="B"), (3, 16, 16)), torch.randn(2, 3, 16, 16)
    folded = fused_resnet.freeze(model, x, backend="eager").plan(x)
    assert measuring.rivals.stitch(folded, "stitched") == (19, 2)  # the main path before each projection has no ReLU
    with torch.no_grad():
        wide = x.to(memory_format=torch.channels_last)
        assert (folded(wide) - model(x)).abs().max() < 1e-4 * model(x).abs().max()
    assert len(calls) == 19


def test_tensorrt_says_why_it_cannot(monkeypatch):
    model, x = torch.nn.Conv2d(3, 200, 1).eval(), torch.randn(1, 3, 4, 4)
    build = measuring.variant_builders(model, x, dtypes=[torch.float32], baselines=("tensorrt",))
    assert set(build) == {"eager NCHW fp32", "tensorrt fp32", "frozen fp32"}
    for module, reason in ((None, "tensorrt is not installed"), (object(), "RuntimeError: it needs an NVIDIA GPU")):
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        assert measuring.build_variants({"tensorrt": build["tensorrt fp32"]}) == ({}, {"tensorrt": reason})


def test_a_cache_is_read_as_often_as_is_counted():
    if not runtime.INTERPRETED:
        pytest.skip("needs Triton's interpreter (TRITON_INTERPRET=1)")
    source, out = torch.randn(3 * cache_read.BLOCK), torch.full((5,), math.nan)
    cache_read.launch(source, out)
    torch.testing.assert_close(out, source.sum().expand(5), atol=1e-2, rtol=1e-4)
    assert cache_read.bytes_read(source, out) == 5 * 3 * cache_read.BLOCK * 4


def test_calibrated_model_has_sane_activations_and_its_momenta_back():
    model = measuring.calibrated(models.create("resnet20"), (3, 32, 32))
    assert not model.training and model.bn1.momentum == 0.1
    outputs = []
    model.layer3[-1].bn2.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    assert 0.3 < outputs[0].std() < 3


def test_blocks_of_the_stages():
    found = measuring.blocks_of(models.create("resnet18"), (3, 64, 64))
    assert [(name, shape) for name, _, shape in found] == [
        ("layer1.1", (64, 16, 16)), ("layer2.1", (128, 8, 8)), ("layer3.1", (256, 4, 4)), ("layer4.1", (512, 2, 2)),
    ]  # fmt: skip


def test_one_variant_that_cannot_be_built_does_not_cost_the_others():
    def broken():
        raise RuntimeError("\n  no C++ compiler\nmore")

    def missing():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    found, skipped = measuring.build_variants({"a": broken, "b": lambda: "built", "c": missing})
    assert found == {"b": "built"}
    assert skipped == {"a": "RuntimeError: no C++ compiler", "c": "x is not installed"}


def test_a_variant_that_breaks_when_it_runs_does_not_cost_the_others(monkeypatch):
    def broken():
        raise RuntimeError("an illegal memory access")

    builders = {"eager NCHW fp32": lambda: lambda: x, "frozen fp32": lambda: lambda: x, "compile fp32": lambda: broken}
    monkeypatch.setattr(measuring.networks, "variant_builders", lambda *_, **__: builders)
    x = torch.randn(2, 3)
    row = measuring.NetworkSubject("x", torch.nn.Identity(), x.shape, "cpu", [torch.float32]).measured(1.0, rounds=1)
    assert set(row["variants"]) == {"eager NCHW fp32", "frozen fp32"}
    assert row["skipped"] == {"compile fp32": "RuntimeError: an illegal memory access"}


def test_a_network_says_which_of_its_variants_are_built(monkeypatch):
    shape, dtypes = (2, 3, 4, 4), [torch.float32, torch.bfloat16]
    built = lambda builders, _: ({name: lambda: torch.ones(shape) for name in builders}, {})  # noqa: E731
    monkeypatch.setattr(measuring.networks, "build_variants", built)
    subject = measuring.NetworkSubject(
        "x", torch.nn.Identity(), shape, "cpu", dtypes, ("folded",), ("auto", "eager"), with_fused=True
    )
    row = subject.measured(1.0, rounds=1)
    names = {f"{kind} {dtype}" for kind in ("fused", "folded", "frozen") for dtype in ("fp32", "bf16")}
    assert set(row["variants"]) == {"eager NCHW fp32", "frozen fp32 eager", "frozen bf16 eager", *names}
    assert row["batch"] == 2 and row["skipped"] == {}


def test_max_error_is_relative_to_the_largest_output():
    model, x = torch.nn.Identity(), torch.tensor([[1.0, -4.0], [9.0, 9.0], [2.0, 0.5]])
    wrong = x.clone()
    wrong[2, 1] += 1.0  # of the last image
    assert measuring.max_error(model, x, {"right": lambda: x, "wrong": lambda: wrong}) == {"right": 0.0, "wrong": 0.25}


# ---------------------------------------------------------------------------------------------------------- provenance


@pytest.fixture
def tree(tmp_path):
    """A project with one CUDA and one Triton source."""
    for file in ("csrc/cuda/a.cu", "fused_resnet/kernels/triton/conv/b.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "csrc" / "cuda" / "notes.txt").write_text("not a source")
    return tmp_path


def record(tree, device="NVIDIA H200", date="2026-11-20T08:00:00+00:00", backends=("cuda", "triton"), name="check"):
    made = verified.verified_record(device, date, backends, tree)
    files.write_json(tree / "benchmarks" / "results" / "h200" / f"{name}.json", {"verified": made})


def test_never_verified(tree):
    assert str(verified.newest(tree)) == "kernels not yet verified on a GPU"
    assert verified.newest(tree).never_verified == ("csrc/cuda/a.cu", "fused_resnet/kernels/triton/conv/b.py")


def test_verified(tree):
    record(tree)
    files.write_json(tree / "benchmarks" / "results" / "h200" / "ops.json", {"rows": []})
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20"


def test_changed_since(tree):
    record(tree)
    (tree / "csrc" / "cuda" / "a.cu").write_text("edited")
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20; changed since: csrc/cuda/a.cu"


def test_a_cpu_kernel_is_not_verified_on_a_gpu(tree):
    file = tree / "csrc" / "cpu" / "grouped.h"
    file.parent.mkdir()
    file.write_text("grouped")
    assert "csrc/cpu/grouped.h" not in verified.newest(tree).never_verified
    record(tree)
    path = tree / "benchmarks" / "results" / "h200" / "check.json"
    of_before = json.loads(path.read_text())
    assert "csrc/cpu/grouped.h" not in of_before["verified"]["kernels"]
    of_before["verified"]["kernels"]["csrc/cpu/grouped.h"] = "another digest"
    files.write_json(path, of_before)
    file.write_text("edited")
    assert str(verified.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20"


def test_added_and_removed_since(tree):
    record(tree)
    (tree / "csrc" / "cuda" / "a.cu").rename(tree / "csrc" / "cuda" / "c.cu")
    state = verified.newest(tree)
    assert state.changed == ("csrc/cuda/a.cu (removed)",) and state.never_verified == ("csrc/cuda/c.cu",)


def test_a_backend_that_was_not_verified_is_named(tree):
    record(tree, backends=("triton",))
    assert str(verified.newest(tree)).endswith("; not yet verified: csrc/cuda/a.cu")


def test_the_newest_record_counts(tree):
    record(tree, device="NVIDIA A100", date="2026-11-19T23:00:00+00:00", name="z")
    record(tree, device="NVIDIA H200", date="2026-11-20T01:00:00+00:00", name="a")
    assert verified.newest(tree).device == "NVIDIA H200"


def test_an_unreadable_record_is_not_taken_for_none(tree):
    record(tree)
    (tree / "benchmarks" / "results" / "h200" / "check.json").write_text('{"verified": ')
    with pytest.raises(ValueError, match="results/h200/check.json is not valid JSON"):
        verified.newest(tree)


def test_digests_of_this_tree_cover_both_backends():
    files = sources.digests()
    assert "csrc/cuda/sm80/conv_bn_act.cu" in files and "fused_resnet/kernels/triton/conv/launch.py" in files
