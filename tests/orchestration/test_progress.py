import json

from simla_ray.orchestration.progress import new_lines


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
