from simla_ray.jsonl import read_lines
from simla_ray.training.log import RunLog


def test_resuming_cuts_what_will_be_done_again(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write("metrics.jsonl", [{"step": s, "kind": "train"} for s in range(1, 8)])
    log.write("consumed.jsonl", [{"step": s, "uid": str(s)} for s in range(1, 8)])
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ki')  # killed in the middle of a line
    again = RunLog(tmp_path, 4)
    again.write("metrics.jsonl", [{"step": 5, "kind": "train"}])
    again.event("resume", step=4)
    again.close()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert [line["step"] for line in read_lines(tmp_path / "consumed.jsonl")] == [1, 2, 3, 4]
    assert read_lines(tmp_path / "events.jsonl")[0]["event"] == "resume"
    assert read_lines(tmp_path / "nothing.jsonl") == []


def test_scalars_reach_the_dashboard_and_tensorboard(tmp_path):
    seen = []
    log = RunLog(tmp_path, 0, seen.append)
    log.scalars(3, {"loss/itc": 1.5})
    log.close()
    assert seen == [{"loss/itc": 1.5}]
    assert list((tmp_path / "tensorboard").glob("events.*"))
