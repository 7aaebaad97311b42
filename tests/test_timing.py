"""Timing with callables whose duration is known, the environment record, atomic JSON, and provenance."""

import json
import math

import pytest
import torch

from fused_resnet import backends, bench, models, plan, provenance, timing
from fused_resnet.problem import ConvProblem

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
    memory_bound = timing.Roofline(bytes_per_s=SMALL.bytes_moved * 10.0, flops_per_s=1e30)
    assert memory_bound.time_us(SMALL) == pytest.approx(1e5)
    compute_bound = timing.Roofline(bytes_per_s=1e30, flops_per_s=SMALL.flops * 100.0)
    assert compute_bound.time_us(SMALL) == pytest.approx(1e4)


# ------------------------------------------------------------------------------------------------------- environment


def test_environment_names_what_matters_and_no_place():
    record = timing.environment()
    assert record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert {"date", "cpu", "cpu_flags", "cores", "python", "triton", "gpu", "commit", "dirty"} <= set(record)
    import socket

    text = json.dumps(record)
    assert socket.gethostname() not in text and str(provenance.ROOT) not in text


def test_write_json_replaces_whole_files(tmp_path):
    file = timing.write_json(tmp_path / "deep" / "a.json", {"x": 1})
    timing.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 2} and [f.name for f in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = timing.write_json(tmp_path / "a.json", {"x": 1})

    def interrupted(*_):
        raise error

    monkeypatch.setattr(timing.os, "replace", interrupted)
    with pytest.raises(error):
        timing.write_json(file, {"x": 2})
    assert json.loads(file.read_text()) == {"x": 1} and [f.name for f in tmp_path.iterdir()] == ["a.json"]


def test_write_json_refuses_nan(tmp_path):
    with pytest.raises(ValueError):
        timing.write_json(tmp_path / "a.json", {"x": math.nan})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ subjects


def test_op_variants_are_right_and_say_why_others_are_missing():
    found, skipped = bench.op_variants(SMALL, bench.random_operands(SMALL, "cpu"))
    assert {bench.UNFUSED, bench.FOLDED, "onednn"} <= set(found)
    assert "NVIDIA" in skipped["cudnn"]
    for name, prepared in found.items():
        assert 0 < bench.error_ratio(prepared) <= 1, name


def test_a_wrong_kernel_is_found_and_not_timed(monkeypatch):
    onednn = backends.known("conv_bn_act")["onednn"]
    forward = plan.FrozenConv.forward

    def wrong_in_the_last_image(self, x, residual=None):
        out = forward(self, x, residual).clone()
        out[-1, -1, -1, -1] += 0.01
        return out

    monkeypatch.setattr(plan.FrozenConv, "forward", wrong_in_the_last_image)
    assert onednn.why_not(SMALL) is None
    measured = bench.bench_ops([bench.CountedProblem(SMALL, 1)], device="cpu", budget_s=0.01, rounds=1)
    (mismatch,) = measured["mismatches"]  # eager is not a FrozenConv, so only oneDNN has been broken
    assert mismatch["variant"] == "onednn" and mismatch["error_ratio"] > 1
    assert "onednn" not in measured["rows"][0]["variants"]


def test_a_kernel_that_writes_nan_counts_as_infinitely_wrong(monkeypatch):
    found, _ = bench.op_variants(SMALL, bench.random_operands(SMALL, "cpu"))
    broken = found["onednn"]._replace(run=lambda: torch.full(SMALL.output_shape, math.nan))
    assert bench.error_ratio(broken) == math.inf


def test_summary_lists_every_loss():
    def row(problem, count, base, ours):
        variants = {"base": {"median_us": base}, "ours": {"median_us": ours}}
        return {"problem": problem, "count": count, "variants": variants}

    rows = [row("win", 1, 40.0, 10.0), row("loss", 2, 10.0, 40.0), row("even", 1, 10.0, 10.0)]
    (entry,) = bench.summarise(rows, "base")
    assert entry["geomean_speedup"] == pytest.approx(1.0)
    assert (entry["worst_problem"], entry["worst_speedup"]) == ("loss", 0.25)
    assert (entry["total_us"], entry["total_us_against"]) == (100.0, 70.0)
    assert entry["losses"] == [{"problem": "loss", "speedup": 0.25}]


def test_calibrated_model_has_sane_activations_and_its_momenta_back():
    model = bench.calibrated(models.create("resnet20"), (3, 32, 32))
    assert not model.training and model.bn1.momentum == 0.1
    outputs = []
    model.layer3[-1].bn2.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        model(torch.randn(8, 3, 32, 32))
    assert 0.3 < outputs[0].std() < 3


def test_blocks_of_the_stages():
    found = bench.blocks_of(models.create("resnet18"), (3, 64, 64))
    assert [(name, shape) for name, _, shape in found] == [
        ("layer1.1", (64, 16, 16)), ("layer2.1", (128, 8, 8)), ("layer3.1", (256, 4, 4)), ("layer4.1", (512, 2, 2)),
    ]  # fmt: skip


def test_one_variant_that_cannot_be_built_does_not_cost_the_others():
    def broken():
        raise RuntimeError("\n  no C++ compiler\nmore")

    def missing():
        raise ModuleNotFoundError("No module named 'x'", name="x")

    found, skipped = bench.build_variants({"a": broken, "b": lambda: "built", "c": missing})
    assert found == {"b": "built"}
    assert skipped == {"a": "RuntimeError: no C++ compiler", "c": "x is not installed"}


def test_max_error_is_relative_to_the_largest_output():
    model, x = torch.nn.Identity(), torch.tensor([[1.0, -4.0], [9.0, 9.0], [2.0, 0.5]])
    wrong = x.clone()
    wrong[2, 1] += 1.0  # of the last image
    assert bench.max_error(model, x, {"right": lambda: x, "wrong": lambda: wrong}) == {"right": 0.0, "wrong": 0.25}


# ---------------------------------------------------------------------------------------------------------- provenance


@pytest.fixture
def tree(tmp_path):
    """A project with one CUDA and one Triton source."""
    for file in ("csrc/a.cu", "fused_resnet/triton_kernels/b.py"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(file)
    (tmp_path / "csrc" / "notes.txt").write_text("not a source")
    return tmp_path


def record(tree, device="NVIDIA H200", date="2026-11-20T08:00:00+00:00", backends=("cuda", "triton"), name="check"):
    verified = provenance.verified_record(device, date, backends, tree)
    timing.write_json(tree / "benchmarks" / "results" / "h200" / f"{name}.json", {"verified": verified})


def test_never_verified(tree):
    assert str(provenance.newest(tree)) == "kernels not yet verified on a GPU"
    assert provenance.newest(tree).never_verified == ("csrc/a.cu", "fused_resnet/triton_kernels/b.py")


def test_verified(tree):
    record(tree)
    timing.write_json(tree / "benchmarks" / "results" / "h200" / "ops.json", {"rows": []})
    assert str(provenance.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20"


def test_changed_since(tree):
    record(tree)
    (tree / "csrc" / "a.cu").write_text("edited")
    assert str(provenance.newest(tree)) == "kernels verified on NVIDIA H200, 2026-11-20; changed since: csrc/a.cu"


def test_added_and_removed_since(tree):
    record(tree)
    (tree / "csrc" / "a.cu").rename(tree / "csrc" / "c.cu")
    state = provenance.newest(tree)
    assert state.changed == ("csrc/a.cu (removed)",) and state.never_verified == ("csrc/c.cu",)


def test_a_backend_that_was_not_verified_is_named(tree):
    record(tree, backends=("triton",))
    assert str(provenance.newest(tree)).endswith("; not yet verified: csrc/a.cu")


def test_the_newest_record_counts(tree):
    record(tree, device="NVIDIA A100", date="2026-11-19T23:00:00+00:00", name="z")
    record(tree, device="NVIDIA H200", date="2026-11-20T01:00:00+00:00", name="a")
    assert provenance.newest(tree).device == "NVIDIA H200"


def test_an_unreadable_record_is_not_taken_for_none(tree):
    record(tree)
    (tree / "benchmarks" / "results" / "h200" / "check.json").write_text('{"verified": ')
    with pytest.raises(ValueError, match="results/h200/check.json is not valid JSON"):
        provenance.newest(tree)


def test_digests_of_this_tree_cover_both_backends():
    files = provenance.digests()
    assert "csrc/conv_bn_act.cu" in files and "fused_resnet/triton_kernels/conv_bn_act.py" in files
