"""``experiments/benchmark.py``: what it prints, and how it ends when asked for what cannot be."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simla_ray.config.schema import Device
from simla_ray.errors import UserError
from simla_ray.orchestration import overhead
from simla_ray.orchestration.benchmark import benchmark_main
from simla_ray.report.speed import overhead_lines, rerank_table, speed_tables

SCRIPT = Path(__file__).parents[2] / "experiments/benchmark.py"


def no_reference():
    raise AssertionError("nobody asked for it")


def benchmark(*argv):
    return benchmark_main(argv, no_reference)


# --- step -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    """One real run at a tiny shape: its object, and what it said on the way."""
    command = [sys.executable, SCRIPT, "step", "--shape", "tiny", "--batch", "4", "--steps", "1", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout), done.stderr


def test_json_is_one_object_with_what_scripts_read(measured):
    result, said = measured
    assert 0.1 < result["cpu_seconds_ratio"] < 3 and result["gpu_seconds_ratio"] is None and result["mfu"] is None
    assert result["pairs_per_s"] > 1 and 0.05 < result["flops_per_pair"] / 1e9 < 0.3
    assert 0.1 < result["matmul_share"] < 1 and 1e6 < result["peak_memory_bytes"] < 1e9
    setting = {name: result["setting"][name] for name in ("shape", "device", "precision", "batch", "image_px")}
    assert setting == {"shape": "tiny", "device": "cpu", "precision": "fp32", "batch": 4, "image_px": 48}
    rows = {row["name"]: row for row in result["others"]}
    assert list(rows) == ["simla_ray", "unfused", "albef", "clip", "siglip", "vilt", "mvptr", "uniter"]
    flops = [rows[name]["flops_per_pair"] for name in ("unfused", "simla_ray", "albef", "clip")]
    assert flops == sorted(flops, reverse=True)
    assert result["cpu_seconds_ratio"] == pytest.approx(1 / rows["unfused"]["over_ours"])
    assert all(row["peak_memory_bytes"] > 0 for row in rows.values())
    savings = result["savings"]
    assert savings[0]["name"] == "simla_ray" and len(savings) > 8
    assert all(row["name"].startswith("without ") and row["over_ours"] > 0.3 for row in savings[1:])
    assert "measure    the tiny preset, 48 px, 25 tokens, batch 4, queue 0; one CPU thread, fp32" in said
    assert "round      1 of 1: simla_ray" in said and len(said.splitlines()) < 20


def test_tables_are_aligned_and_summed_up(measured):
    text = speed_tables(measured[0])
    head, *rows = text.splitlines()[:6]
    assert head.split("  ")[0] == "step" and "MFU" not in head and head.endswith("peak GiB")
    assert {len(row) for row in [head, *rows]} == {len(head)}
    assert "of the CPU seconds of the unfused one" in text and "of our step's time is products" in text
    assert "more CPU seconds, the most of these." in text
    assert all(len(line) <= 118 for line in text.splitlines())


MISTAKES = {
    "--shape huge": "--shape: huge is not one of cpu, base, tiny",
    "--batch 1": "--batch: 1 is not in 2..65536",
    "--batch many": "--batch: many is not a whole number",
    "--steps 0": "--steps: 0 is not in 1..10000",
    "--only reference,speed": "--only: speed is not one of reference, methods, savings",
    "--device tpu": "--device: tpu is not one of auto, cpu, gpu",
    "--only methods --image-px 100": "vision.image_px: 100 is not a multiple of vision.patch_px=16",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, capsys):
    assert benchmark("step", "--device", "cpu", *arguments.split()) == 2
    assert capsys.readouterr().err == f"error: {MISTAKES[arguments]}\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["step", "overhead"])
def test_a_gpu_that_is_not_there_is_one_line(command, capsys):
    assert benchmark(command, "--device", "gpu") == 2
    assert capsys.readouterr().err == "error: --device: gpu, but this machine has no usable GPU; use cpu\n"


def test_without_the_tests_only_methods_can_be_measured(tmp_path):
    (tmp_path / "experiments").mkdir()
    copy = shutil.copy(SCRIPT, tmp_path / "experiments")
    spec = importlib.util.spec_from_file_location("installed", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(UserError, match=r"tests/reference: not there; use a whole checkout, or --only methods"):
        module.load_reference()


# --- overhead ---------------------------------------------------------------------------------------------------------


class FakeStep:
    device = torch.device("cpu")

    def __init__(self):
        self.bare = 0

    def __call__(self, number, batches):
        self.bare += 1


class FakePacked:
    class batch:  # noqa: N801
        @staticmethod
        def to(device):
            return None


def test_bare_blocks_come_before_between_and_after_those_of_the_loop():
    step, n = FakeStep(), overhead.BLOCK_STEPS
    alternating = overhead._Alternating(step, FakePacked(), 3)
    before = [step.bare for _ in alternating]
    assert before == [n] * n + [2 * n] * n + [3 * n] * n + [4 * n]
    assert (len(alternating.bare), len(alternating.loop)) == (4, 3)


def test_a_loops_block_is_held_against_its_neighbours():
    alternating = overhead._Alternating(FakeStep(), FakePacked(), 3)
    alternating.bare = [(9.0, 9.0), (2.0, 1.0), (4.0, 1.0), (4.0, 3.0)]
    alternating.loop = [(9.0, 9.0), (3.3, 1.0), (4.0, 2.2)]
    run = overhead.Workshop(overhead.SHAPES["tiny"], torch.device("cpu"), 4).run()
    result = alternating.result(run)
    assert result["overhead"] == pytest.approx(0.05) and result["rounds"] == 2
    assert result["overhead_range"] == pytest.approx([0.025, 0.075])
    assert result["cpu_overhead"] == pytest.approx(0.05)
    assert "Ray Train adds 5.0 % to a step by the clock (2.5 .. 7.5 % in half of the 2 rounds)" in overhead_lines(
        result
    )


def test_rounds_must_be_some(capsys):
    assert benchmark("overhead", "--rounds", "0") == 2
    assert capsys.readouterr().err == "error: --rounds: 0 is not in 1..1000\n"


@pytest.mark.ray
@pytest.mark.slow
def test_overhead_of_one_round_in_a_real_worker(ray_session, monkeypatch):
    lines = []
    result = overhead.measure_overhead(Device.cpu, 1, lines.append)
    assert result["rounds"] == 1 and result["bare"]["seconds_per_step"] > overhead.LEAST_STEP_S
    assert -0.3 < result["overhead"] < 0.5
    assert lines[0].startswith("cluster ")


# --- rerank -----------------------------------------------------------------------------------------------------------


def test_rerank_prints_one_object_and_a_table_of_it(capsys):
    assert benchmark("rerank", "--shape", "tiny", "--px", "32", "48", "--candidates", "200", "--json") == 0
    out, said = capsys.readouterr()
    result = json.loads(out)
    assert list(result) == ["32", "48", "setting"] and result["setting"]["candidates"] == 200
    for side, tokens in (("32", 17), ("48", 37)):
        found = result[side]
        assert (found["images"], found["image_tokens"]) == (2, tokens)
        assert 0 < found["ratio_range"][0] <= found["ratio"] <= found["ratio_range"][1] < 2
        ours, plain = found["seconds_per_candidate"].values()
        assert ours / plain == pytest.approx(found["ratio"]) and 0 < found["largest_difference"] < 1e-5
    assert "round      2 of 2: simla_ray" in said
    table = rerank_table(result).splitlines()
    assert table[1].startswith("2 of 32 px") and "200 candidates, 100 texts of 25 tokens with each image" in table[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--px 384 wide", "--px: 384 wide is not a list of whole numbers"),
        ("--px 8", "--px: 8 is not in 16..4096"),
        ("--px 250", "vision.image_px: 250 is not a multiple of vision.patch_px=16"),
        ("--candidates 250", "--candidates: 250 is not a multiple of 100 in 100..1000000"),
        ("--candidates few", "--candidates: few is not a whole number"),
        ("--shape huge", "--shape: huge is not one of cpu, base, tiny"),
    ],
)
def test_rerank_of_what_cannot_be_is_one_line(arguments, said, capsys):
    assert benchmark("rerank", *arguments.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
