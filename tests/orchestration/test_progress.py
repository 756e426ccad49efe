import json
import time

from simla_ray.orchestration.progress import PATIENCE_S, Progress, Waiting, new_lines


def test_progress_reads_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert new_lines(path, 0) == ([], 0)
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines, offset = new_lines(path, 0)
    assert lines == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    lines, offset = new_lines(path, offset)
    assert lines == [{"step": 3}]
    assert new_lines(path, offset) == ([], offset)
    path.write_text(json.dumps({"step": 1}) + "\n")  # a resumed run cuts the file
    assert new_lines(path, offset)[0] == [{"step": 1}]


def test_who_waits_for_workers_is_told_so_now_and_then():
    waiting = Waiting(100.0)
    assert waiting.after([], 100.0 + PATIENCE_S - 1) is None
    assert waiting.after([], 100.0 + PATIENCE_S) == PATIENCE_S
    assert waiting.after([], 101.0 + PATIENCE_S) is None  # it has just been said
    assert waiting.after([], 100.0 + 2 * PATIENCE_S) == 2 * PATIENCE_S
    assert waiting.after([{"event": "start"}], 500.0) is None
    assert waiting.after([{"event": "checkpoint"}], 900.0) is None
    for end in ("failure", "hung", "notice", "rollback"):
        assert waiting.after([{"event": end}], 1000.0) is None
        assert waiting.after([], 1000.0 + PATIENCE_S) == PATIENCE_S
        assert waiting.after([{"event": "resume"}], 1100.0) is None
        assert waiting.after([], 2000.0) is None
    assert waiting.after([{"event": "failure"}, {"event": "resume"}], 3000.0) is None
    assert waiting.after([], 4000.0) is None


def test_progress_says_what_the_workers_wait_for(tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ray.orchestration.progress.PATIENCE_S", 0.0)
    said = []
    with Progress(tmp_path, 10, said.append, lambda: "two workers"):
        while not said:
            time.sleep(0.01)
    assert said[0].startswith("waiting    0:0") and said[0].endswith(" for two workers")
