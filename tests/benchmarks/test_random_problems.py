"""Random problems in parts, each a process of its own, and the record that was committed."""

import json

import pytest

from fused_resnet import testing
from fused_resnet.machine import files


def test_random_problems_in_parts(tmp_path, monkeypatch):
    """Parts are kept and summed; one that ends its process is reported and run again the next time."""
    from benchmarks import random_problems

    def run_part(file, problems, seed, device, kind):
        asked.append(seed)
        if seed in ending:
            return -11
        files.write_json(file, testing.verify(problems, seed, device, ["eager"]).as_dict())

    asked, ending = [], {8}
    monkeypatch.setattr(random_problems, "run_part", run_part)
    out = tmp_path / "record.json"
    size = ["--problems", "5", "--per-part", "2", "--seed", "7", "--device", "cpu"]
    arguments = [*size, "--parts", str(tmp_path / "parts"), "--out", str(out)]
    assert random_problems.main(arguments) == 1
    record = json.loads(out.read_text())
    assert record["ended_without_report"] == [{"seed": 8, "problems": 2, "exit_code": -11}] and not record["passed"]
    ending.clear()
    assert random_problems.main(arguments) == 0 and asked == [7, 8, 9, 8]
    record = json.loads(out.read_text())
    assert record["problems"] == 5 and record["seeds"] == [7, 8, 9] and record["passed"]
    assert sum(entry["ok"] for entry in record["backends"].values()) == 5
    worst = max(testing.verify(2, 7, backends=["eager"]).backends.values(), key=lambda entry: entry.worst_error)
    assert max(entry["worst_error"] for entry in record["backends"].values()) >= worst.worst_error > 0


def test_a_part_runs_the_command(tmp_path):
    from benchmarks import random_problems

    file, other = tmp_path / "part.json", tmp_path / "other.json"
    for kind, operator in (("random", "add_relu"), ("common", "conv_bn_act")):  # what seed 4 begins with
        assert random_problems.run_part(file, 1, 4, "cpu", kind) is None
        assert f"{operator}/eager" in json.loads(file.read_text())["backends"]
    assert random_problems.run_part(other, 1, 4, "tpu", "random") == 2 and not other.exists()


def test_the_committed_record():
    """Its counts are those of its problems, and it says that all agreed."""
    from benchmarks import random_problems

    record = json.loads((random_problems.RECORDS / "random_problems.json").read_text())
    assert record["passed"] and not record["ended_without_report"] and len(set(record["seeds"])) == len(record["seeds"])
    for op in ("conv_bn_act", "add_relu"):
        eager, triton = (record["backends"][f"{op}/{name}"] for name in ("eager", "triton"))
        assert eager["cannot_run"] == {} and triton["ok"] > 0.8 * eager["ok"]
    assert sum(record["backends"][f"{op}/eager"]["ok"] for op in ("conv_bn_act", "add_relu")) == record["problems"]


@pytest.mark.parametrize("arch", (80, 90))
def test_the_committed_records_of_emulated_kernels(arch):
    """2,000 problems, each counted once by every kernel of its operator; each kernel that the GPU has ran some."""
    from benchmarks import random_problems
    from fused_resnet.emulation import verify as emulated

    record = json.loads((random_problems.RECORDS / f"sm_{arch}_problems.json").read_text())
    assert record["passed"] and record["emulated"] == f"sm_{arch}" and not record["ended_without_report"]
    assert record["problems"] == 2000 == record["per_part"] * len(set(record["seeds"]))
    assert record["kinds"] == ["random", "common"] * 4 and not record["environment"]["dirty"]
    counts = {name: entry["ok"] + sum(entry["cannot_run"].values()) for name, entry in record["backends"].items()}
    assert set(counts) == set(emulated.KERNELS)
    for name, count in counts.items():
        assert count == (counts["cuda/add_relu"] if name.endswith("add_relu") else counts["cuda/conv_bn_act"])
        assert (record["backends"][name]["ok"] > 0) == (arch >= 90 or not name.endswith("_tma")), name
    assert counts["cuda/add_relu"] + counts["cuda/conv_bn_act"] == 2000


@pytest.mark.parametrize("name, problems", (("int8", 5000), ("sm_80_int8", 500), ("sm_90_int8", 500)))
def test_the_committed_records_of_bytes(name, problems):
    """No byte differs by any kernel that ran, and each that is for all machines did."""
    from benchmarks import random_problems

    record = json.loads((random_problems.RECORDS / f"{name}_problems.json").read_text())
    assert record["passed"] and not record["ended_without_report"] and not record["environment"]["dirty"]
    assert record["problems"] == problems == record["per_part"] * len(set(record["seeds"]))
    assert set(record["kinds"]) == {"int8"} and record.get("emulated", "int8") == name.removesuffix("_int8")
    ran = {kernel: entry for kernel, entry in record["backends"].items() if entry["ok"]}
    on_cpu = {f"conv_int8/{kernel}" for kernel in ("amx_int8_emulated", "avx2_int8", "portable_int8")}
    assert ran.keys() >= (on_cpu if name == "int8" else {"triton/pointer", "cuda/conv_bn_act"})
    for kernel, entry in ran.items():
        assert entry["num_differing"] == 0 and entry["num_bytes"] > 100 * entry["ok"], kernel


def test_emulated_parts_of_both_kinds(tmp_path, monkeypatch):
    from benchmarks import random_problems
    from fused_resnet.emulation import verify as emulated

    def verify(problems, seed, arch, *, kind):
        asked.append((problems, seed, arch, kind))
        report = testing.Report(seed, f"emulated sm_{arch}", problems)
        report.add("triton/pointer", testing.Outcome("", "ok", worst_error=0.5), "a call", "a case")
        return report

    asked = []
    monkeypatch.setattr(emulated, "why_not", lambda: None)
    monkeypatch.setattr(emulated, "verify", verify)
    out = tmp_path / "record.json"
    size = ["--problems", "5", "--per-part", "2", "--seed", "7", "--device", "sm_90", "--kind", "mixed"]
    assert random_problems.main([*size, "--parts", str(tmp_path / "parts"), "--out", str(out)]) == 0
    assert asked == [(2, 7, 90, "any"), (2, 8, 90, "common"), (1, 9, 90, "any")]
    record = json.loads(out.read_text())
    assert record["emulated"] == "sm_90" and record["problems"] == 5 and record["passed"]
    assert record["kinds"] == ["random", "common", "random"] and record["backends"]["triton/pointer"]["ok"] == 3
