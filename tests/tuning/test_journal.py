"""The journal of a long run."""

from fused_resnet.tuning.journal import Journal


def test_a_journal_counts_only_for_its_identity_and_survives_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    journal = Journal(path, {"torch": "1"})
    journal.finish("p", {"x": 1})
    with open(path, "a") as file:
        file.write('\n{"id": "cut sho')
    journal.end("q", "c", {"error_ratio": 0.5})
    for line in ("[]", "null", '{"id": 1}', "\x00"):
        with open(path, "a") as file:
            file.write("\n" + line)
    again = Journal(path, {"torch": "1"})
    assert again.row("p") == {"x": 1} and again.outcome("q", "c") == {"error_ratio": 0.5} and again.row("q") is None
    other = Journal(path, {"torch": "2"})
    assert other.row("p") is None
    journal.start_anew()
    assert journal.row("p") is None and Journal(path, {"torch": "1"}).outcome("q", "c") is None


def test_an_interrupted_candidate_is_none_that_killed(tmp_path):
    journal = Journal(tmp_path / "a.jsonl", {})
    for _ in range(3):
        journal.begin("p", "c")
        journal.interrupt("p", "c")
    assert Journal(tmp_path / "a.jsonl", {}).outcome("p", "c") is None
