"""The data benchmark: all contenders make the same number of samples, and the numbers say what they claim."""

import json

import pytest

from simla_ray.errors import UserError
from simla_ray.orchestration import ingest
from simla_ray.orchestration.benchmark import benchmark_main
from simla_ray.report.speed import ingest_tables


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ingest, "PARTS", 2)
    monkeypatch.setattr(ingest, "LEAD_S", 0.1)
    monkeypatch.setattr(ingest, "MICRO", 16)
    monkeypatch.setattr(ingest, "TOWER_PX", 64)


@pytest.mark.ray
@pytest.mark.slow
def test_json_is_one_object_with_what_scripts_read(ray_session, small, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(ingest._Part, "rate", property(lambda part: made.append(part) or part.pairs / part.seconds))
    assert benchmark_main(["data", "--px", "256", "--rows", "256", "--tasks", "2", "--json"], lambda: None) == 0
    out = capsys.readouterr()
    assert out.out.count("\n") == 1
    result = json.loads(out.out)
    found = result["256"]
    rates = found["pairs_per_s"]
    assert list(rates) == [ingest.OURS, ingest.TWIN, ingest.TWIN_DRAFT, ingest.PLAIN]
    for key, other in (("dataloader", ingest.TWIN), ("pillow", ingest.PLAIN)):
        assert found[f"ratio_to_{key}"] == pytest.approx(rates[ingest.OURS] / rates[other])
        low, high = found[f"ratio_to_{key}_range"]
        assert low <= found[f"ratio_to_{key}"] <= high
    assert 0 < found["first_batch_s"] < 60
    assert {part.pairs for part in made} == {128, 256}  # parts, and the epoch they make
    assert result["memory"]["rows"] == 256 and len(result["memory"]["bytes"]) == ingest.LOOKS
    assert min(result["memory"]["bytes"]) > 5e7
    assert result["scaling"][0]["decode_cpus"] == 1
    assert "part 2 of 2" in out.err
    text = ingest_tables(result, 1000)
    assert "256 JPEGs of 256 px" in text and "1,000 pairs/s need about" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--px", "100"], "--px: 100 is not one of 256, 1024"),
        (["--px", "big"], "--px: big is not a list of whole numbers"),
        (["--rows", "10"], "--rows: 10 is not in"),
        (["--tasks", "0"], "--tasks: 0 is not in 1..1024"),
        (["--pairs-per-s", "many"], "--pairs-per-s: many is not a whole number"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert benchmark_main(["data", *arguments], lambda: None) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_plan_says_what_cannot_be():
    with pytest.raises(UserError, match="--rows"):
        ingest.Plan(rows=1)
