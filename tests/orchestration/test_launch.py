import json

from simla_ray.errors import UserError
from simla_ray.orchestration.launch import _new_lines, _user_error_in


def test_progress_reads_whole_lines_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert _new_lines(path, 0) == ([], 0)
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    lines, offset = _new_lines(path, 0)
    assert lines == [{"step": 1}, {"step": 2}]
    with path.open("a") as file:
        file.write('ep": 3}\n')
    lines, offset = _new_lines(path, offset)
    assert lines == [{"step": 3}]
    assert _new_lines(path, offset) == ([], offset)
    path.write_text(json.dumps({"step": 1}) + "\n")  # a resumed run cuts the file
    assert _new_lines(path, offset)[0] == [{"step": 1}]


def test_a_users_mistake_is_found_inside_other_errors():
    mistake = UserError("data.train: gone")
    try:
        try:
            raise mistake
        except UserError as error:
            raise RuntimeError("worker failed") from error
    except RuntimeError as error:
        assert _user_error_in(error) is mistake
    assert _user_error_in(RuntimeError("our own fault")) is None
