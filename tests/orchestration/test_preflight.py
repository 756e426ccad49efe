"""Preflight: wrong situations, each told in one line before any worker starts; all of them at once."""

import re
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import torch

from simla_ray.config.load import load_run
from simla_ray.data.cursor import Cursor
from simla_ray.errors import UserError
from simla_ray.models.model import Model
from simla_ray.orchestration import cli, launch, preflight
from simla_ray.orchestration.cluster import Cluster
from simla_ray.orchestration.preflight import nodes as cluster_nodes
from simla_ray.orchestration.preflight.capacity import room
from simla_ray.orchestration.preflight.checks import Case, require
from simla_ray.orchestration.preflight.footprint import footprint, kinds_of_step
from simla_ray.orchestration.preflight.nodes import Node, ask, marked, ray_nodes, try_gpus
from simla_ray.orchestration.preflight.probes import Answers, File, existing, look
from simla_ray.orchestration.preflight.trial import Trial, samples_per_s, try_step
from simla_ray.training.checkpoint import Snapshot
from simla_ray.training.comm import Comm
from simla_ray.training.measure import CLS_ID, held_bytes, look_inside, synthetic_batch
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

GIB = 2**30
CPU = torch.device("cpu")
VERSIONS = {"python": "3.12.3", "simla_ray": "0.1.0 (code 5f1c09aa)", "torch": "2.13.0"}
SEEN = Answers(VERSIONS, cores=4, memory=16 * GIB, ray_temp_used=0.4)
JOINED = Cluster(False, "10.0.0.1:6379", 2, 8, 0, None)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_ray(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture
def files(world_files):
    return [f"data.{s}=[{world_files / s}.parquet]" for s in ("train", "val")]


@pytest.fixture(scope="module")
def takes():
    return footprint(load_run(), gpu=False)


@pytest.fixture
def good(files, takes) -> Case:
    """Two nodes of four CPUs, on which the tiny run fits."""
    run, _ = preflight.check(load_run(overrides=files))
    nodes = [Node(f"10.0.0.{i}", 4, 0, 4 * GIB, id=f"{i}" * 8, answers=SEEN) for i in (1, 2)]
    return Case(run, nodes, own=False, gpu=False, driver=SEEN, storage=100 * GIB, footprint=takes)


def with_keys(case: Case, **sections) -> Case:
    run = case.run
    changed = {name: getattr(run, name).model_copy(update=keys) for name, keys in sections.items()}
    return replace(case, run=run.model_copy(update=changed))


def second(case: Case, node=None, **answers) -> Case:
    """The second node with something else."""
    first, other = case.nodes
    other = replace(other, answers=replace(other.answers, **answers), **(node or {}))
    return replace(case, nodes=[first, other])


def on_gpus(case: Case, trial: Trial, gpus: float = 2) -> Case:
    nodes = [replace(case.nodes[0], gpus=gpus), case.nodes[1]]
    return replace(case, nodes=nodes, gpu=True, trials={"10.0.0.1": trial})


FITS = Trial(pairs_per_s=900.0, peak_bytes=8 * GIB, free_bytes=22 * GIB)

#: What is wrong -> what it is like, the key, what was found, the remedy.
WRONG = {
    "too few CPUs": (
        lambda c: with_keys(c, data={"decode_cpus": 7}),
        "ray.workers", "need 9 CPUs, the cluster has 8", "use fewer of them, or add nodes",
    ),
    "CPUs, but on no single node": (
        lambda c: with_keys(c, ray={"cpus_per_worker": 5.0, "workers": 1}),
        "ray.cpus_per_worker", "5 CPUs fit 0 times on single nodes, the largest of which has 4",
        "use fewer CPUs a worker",
    ),
    "too few GPUs": (
        lambda c: on_gpus(c, FITS, gpus=1),
        "ray.device", "the cluster has 1 GPUs for ray.workers=2", "use fewer workers, add nodes, or use cpu",
    ),
    "GPUs, but too few CPUs beside them": (
        lambda c: with_keys(on_gpus(c, FITS), ray={"cpus_per_worker": 2.5}),
        "ray.cpus_per_worker", "2.5 CPUs fit 1 times on single nodes with GPUs", "or larger nodes",
    ),
    "a torch without CUDA": (
        lambda c: on_gpus(c, Trial(problem="torch 2.13.0+cpu sees no GPU")),
        "ray.device", "torch 2.13.0+cpu sees no GPU on 10.0.0.1", "needs a CUDA build of torch",
    ),
    "a batch that does not fit": (
        lambda c: on_gpus(c, Trial(free_bytes=22 * GIB, problem="out of memory", fits=False)),
        "batch.micro", "32 pairs does not fit: out of memory with 22.0 GiB free on 10.0.0.1", "use a smaller one",
    ),
    "a batch that fits alone only": (
        lambda c: on_gpus(c, replace(FITS, peak_bytes=22 * GIB)),
        "batch.micro", "22.0 GiB with 22.0 GiB free on 10.0.0.1", "activation_checkpointing=true",
    ),
    "a node that hangs": (
        lambda c: replace(c, nodes=[c.nodes[0], replace(c.nodes[1], answers=None, silence="no answer within 60 s")]),
        "ray.address", "no answer within 60 s on 10.0.0.2", "repair or remove the node",
    ),
    "another version": (
        lambda c: second(c, packages=VERSIONS | {"torch": "2.12.1"}),
        "packages", "torch 2.12.1 in place of 2.13.0 on 10.0.0.2", "constraints.txt",
    ),
    "other code of one version": (
        lambda c: second(c, packages=VERSIONS | {"simla_ray": "0.1.0 (code 00000000)"}),
        "packages", "(code 00000000) in place of 0.1.0 (code 5f1c09aa) on 10.0.0.2", "on every node",
    ),
    "a clock that is wrong": (
        lambda c: second(c, node={"ahead_s": -310.0}),
        "clock", "310 s behind the driver on 10.0.0.2, at most 2 s", "synchronise it by NTP",
    ),
    "a storage that is not shared": (
        lambda c: second(c, storage_problem="not there"),
        "storage", "one folder that every node can write, but not there on 10.0.0.2", "mount a shared file system",
    ),
    "a storage that a node cannot write": (
        lambda c: second(c, storage_problem="not writable: read-only file system"),
        "storage", "not writable: read-only file system on 10.0.0.2", "mount a shared file system",
    ),
    "data that a node does not have": (
        lambda c: second(c, unreadable=((File("data.train", "/d/a.parquet", 9), "no such file or directory"),)),
        "data.train", "/d/a.parquet: no such file or directory on 10.0.0.2", "reads the same file under this path",
    ),
    "too little memory": (
        lambda c: with_keys(second(c, node={"cpus": 8.0}, memory=GIB), ray={"workers": 2}),
        "batch.micro", "there is 1.0 GiB for 2 workers on 10.0.0.2", "use a smaller one",
    ),
    "a small object store": (
        lambda c: second(c, node={"object_store": 2**22, "cpus": 8.0}),
        "data.decode_cpus", "there is 4 MiB for 2 workers on 10.0.0.2", "larger --object-store-memory",
    ),
    "no room for two checkpoints": (
        lambda c: replace(c, storage=2**20),
        "storage", "1 MiB free in", "free some, or name another folder",
    ),
    "a full disk under Ray": (
        lambda c: second(c, ray_temp_used=0.97),
        "RAY_TMPDIR", "97% full on 10.0.0.2", "start Ray there with a --temp-dir",
    ),
}  # fmt: skip


def misses(case: Case) -> list[str]:
    return [check.miss for check in preflight.judge(case) if check.miss]


def test_where_nothing_is_wrong_nothing_is_said(good):
    checks = preflight.judge(good)
    require(checks)
    assert not any(check.warning for check in checks)
    lines = [check.line() for check in checks]
    assert "ready      CPUs: 8 on 2 nodes (needs 4: 2 workers of 1, 2 to decode)" in lines
    assert "ready      nodes: 2 answer (needs 2)" in lines
    assert misses(on_gpus(good, FITS)) == []


@pytest.mark.parametrize("situation", WRONG)
def test_one_line_says_what_is_wrong_and_no_worker_starts(situation, good, no_ray, monkeypatch, capsys):
    change, key, found, remedy = WRONG[situation]
    case = change(good)

    def refuse(*_):
        raise AssertionError("it went on")

    monkeypatch.setattr(launch.clusters, "join", lambda run: JOINED)
    monkeypatch.setattr(preflight, "_look_around", lambda *_: case)
    monkeypatch.setattr(launch, "prepare", refuse)
    monkeypatch.setattr(launch, "_fit", refuse)
    with pytest.raises(UserError) as raised:
        launch.pretrain(case.run, lambda line: None)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(f"{key}: ")
    assert found in line and remedy in line


def test_one_kind_of_miss_on_several_nodes_is_one_line(good):
    gone = ((File("data.val", "/d/v.parquet", 9), "no such file or directory"),)
    answers = replace(SEEN, unreadable=gone, packages=VERSIONS | {"torch": "2.12.1"})
    case = replace(good, nodes=[replace(node, answers=answers) for node in good.nodes])
    packages, data = misses(case)
    assert packages.startswith("packages: torch 2.12.1 in place of 2.13.0 on 10.0.0.1, 10.0.0.2;")
    assert data.startswith("data.val: /d/v.parquet: no such file or directory on 10.0.0.1, 10.0.0.2;")


def test_several_files_that_lack_are_counted(good):
    gone = tuple((File("data.train", f"/d/{i}.parquet"), "not there") for i in range(3))
    (line,) = misses(second(good, unreadable=gone))
    assert "/d/0.parquet: not there (and 2 more) on 10.0.0.2" in line


def test_a_node_without_cpus_reads_and_trains_nothing(good):
    head = Answers(VERSIONS, 2, memory=2**20, ray_temp_used=0.4, unreadable=((File("data.val", "/d"), "gone"),))
    case = replace(good, nodes=[*good.nodes, Node("10.0.0.9", 0, 0, 2**20, "9", head)])
    assert misses(case) == []


def test_a_run_that_goes_on_needs_room_for_one_more_checkpoint(good):
    one = good.footprint.checkpoint
    assert misses(replace(good, storage=int(1.5 * one)))
    assert not misses(replace(good, storage=int(1.5 * one), resumes=True))
    (warning,) = [c.warning for c in preflight.judge(replace(good, storage=3 * one)) if c.warning]
    assert warning.startswith("checkpoint.keep: 3 and one more take 19 MiB, 14 MiB free in")


def test_an_elastic_run_needs_what_it_begins_with(good):
    case = with_keys(good, ray={"workers": 8, "cpus_per_worker": 3.0, "min_workers": 2}, batch={"global_": 512})
    assert not misses(case)
    (line,) = misses(with_keys(case, ray={"workers": 8, "cpus_per_worker": 3.0, "min_workers": 3}))
    assert line.startswith("ray.min_workers: 3 workers of 3 CPUs and data.decode_cpus=2 need 11 CPUs")


def test_a_narrow_object_store_is_a_warning(good):
    case = second(good, node={"object_store": 18 * 2**20, "cpus": 8.0})
    assert not misses(case)
    (warning,) = [c.warning for c in preflight.judge(case) if c.warning]
    assert "wants 12 MiB of the object store, and there is 18 MiB for 2 workers on 10.0.0.2; start Ray" in warning


def test_too_few_decoders_are_a_warning(good):
    case = replace(good, trials={"this machine": Trial(pairs_per_s=400.0)}, samples_per_s=100.0)
    assert not misses(case)
    (warning,) = [c.warning for c in preflight.judge(case) if c.warning]
    assert warning.startswith("data.decode_cpus: 2, but workers will wait: one CPU here makes about 100 samples/s")
    assert "they want about 8 for 2 workers of 400 pairs/s" in warning


def test_a_ray_of_its_own_is_not_compared_with_itself(good):
    alone = replace(good, own=True, nodes=[replace(good.nodes[0], name="this machine")])
    checked = {check.what for check in preflight.judge(alone)}
    assert checked.isdisjoint({"nodes", "packages", "clocks"})
    assert {"storage", "disk", "memory", "object store", "data"} <= checked


# --- probes -----------------------------------------------------------------------------------------------------------


def test_a_look_at_this_machine(tmp_path, world_files):
    train = world_files / "train.parquet"
    wanted = (
        File("data.train", str(train), train.stat().st_size),
        File("data.train", str(train), 5),
        File("data.val", str(tmp_path / "gone.parquet")),
        File("data.image_roots", str(tmp_path)),
    )
    with marked(tmp_path / "not" / "yet", wanted, ("torch", "no_such_package")) as questions:
        assert questions.marker.parent == tmp_path
        seen = look(questions, "me")
        assert (questions.marker / "me").read_text() == questions.token
        assert look(replace(questions, token="other"), "me").storage_problem == "another folder of that name"
        assert look(replace(questions, marker=tmp_path / "gone"), "me").storage_problem == "not there"
    assert list(tmp_path.iterdir()) == []
    assert seen.storage_problem == ""
    assert [reason for _, reason in seen.unreadable] == [
        f"{train.stat().st_size} bytes in place of 5", "no such file or directory",
    ]  # fmt: skip
    assert seen.packages["no_such_package"] == "absent" and re.search(r"\(code \w{8}\)", seen.packages["simla_ray"])
    assert min(seen.memory, seen.cores) > 0 and 0 < seen.ray_temp_used < 1


def test_of_many_files_some_are_opened_on_every_node(files, tmp_path):
    run, indexes = preflight.check(load_run(overrides=[*files, f"data.image_roots=[{tmp_path}]"]))
    (unit, *_) = indexes["train"].units
    many = [replace(unit, path=str(tmp_path / f"{i:03d}.parquet")) for i in range(100)]
    for one in many:
        Path(one.path).write_bytes(b"x" * 7)
    found = list(preflight._needed_files(run, indexes | {"train": replace(indexes["train"], units=tuple(many))}))
    train = [file for file in found if file.key == "data.train"]
    assert 10 <= len(train) <= preflight.OPENED and {file.size for file in train} == {7}
    assert train[0].path.endswith("000.parquet") and train[-1].path > str(tmp_path / "090")
    assert [file.key for file in found[len(train) :]] == ["data.val", "data.image_roots"]  # data.test is data.val


def test_a_storage_that_cannot_be_written_is_a_question_that_says_so(tmp_path):
    (tmp_path / "file").touch()
    with marked(tmp_path / "file", (), ()) as questions:
        assert look(questions, "me").storage_problem == "not writable: not a directory"
    assert existing(tmp_path / "a" / "b") == tmp_path


@pytest.mark.ray
def test_nodes_are_asked_by_tasks(ray_session, tmp_path):
    (node,) = ray_nodes()
    assert node.cpus == 6 and node.object_store > 0
    gone = File("data.train", str(tmp_path / "gone.parquet"))
    with marked(tmp_path, (gone,), ("torch",)) as questions:
        here = look(questions, "this")
        (asked,) = ask([node], questions)
        assert asked.silence == "" and abs(asked.ahead_s) < 2
        assert asked.answers.packages == here.packages
        assert asked.answers.storage_problem == "" and asked.answers.unreadable == here.unreadable
        assert asked.answers.memory > 0
        (elsewhere,) = ask([node], replace(questions, marker=tmp_path / "not mounted"))
        assert elsewhere.answers.storage_problem == "not there"
    assert list(tmp_path.iterdir()) == []
    assert try_gpus([node], load_run()) == {}


@pytest.mark.ray
def test_a_node_that_hangs_or_fails_is_named_and_not_waited_for(ray_session, tmp_path, monkeypatch):
    nodes = ray_nodes()

    def hang(questions, me):
        time.sleep(600)

    def fail(questions, me):
        raise ModuleNotFoundError("No module named 'timm'")

    monkeypatch.setattr(cluster_nodes, "ANSWER_S", 3.0)
    with marked(tmp_path, (), ()) as questions:
        monkeypatch.setattr(cluster_nodes, "look", hang)
        began = time.monotonic()
        assert ask(nodes, questions)[0].silence == "no answer within 3 s"
        assert time.monotonic() - began < 10
        monkeypatch.setattr(cluster_nodes, "ANSWER_S", 60.0)
        monkeypatch.setattr(cluster_nodes, "look", fail)
        assert "No module named 'timm'" in ask(nodes, questions)[0].silence
        monkeypatch.undo()
    with pytest.raises(UserError, match=r"need 9 CPUs, the cluster has 6"):
        require(room(load_run(overrides=["data.decode_cpus=7"]), nodes, gpu=False))


# --- what a run takes -------------------------------------------------------------------------------------------------


def test_the_estimate_is_what_a_step_and_a_checkpoint_take(tmp_path, vocabulary):
    sizes = ["batch.micro=8", "batch.global=8", "ray.workers=1", "queue=64"]
    run = load_run(overrides=[*sizes, f"text.vocab_size={len(vocabulary)}"])
    losses = Losses(run, Model(run, len(vocabulary)), None, CLS_ID, None).train()
    step, batch = Step(run, losses, 1000, Comm(), CPU), synthetic_batch(run, len(vocabulary))
    found = footprint(run, gpu=False)
    inside = look_inside(lambda: step(999, [(0, batch)]), CPU)
    assert held_bytes(step.model, step.optimizer) == pytest.approx(found.weights + found.moments, rel=0.01)
    assert inside.peak_bytes == pytest.approx(found.batch + found.gradients, rel=0.25)
    vocabulary.save(tmp_path / "prepared")
    snapshot = Snapshot(step.model, step.optimizer)
    snapshot.take(run, step.model, step.optimizer, State(1, Cursor.start(2)))
    snapshot.write(tmp_path / "checkpoint", tmp_path / "prepared")
    size = sum(f.stat().st_size for f in (tmp_path / "checkpoint").glob("*.safetensors"))
    assert size == pytest.approx(found.checkpoint, rel=0.05)


def test_every_set_of_objectives_has_its_step():
    assert sorted(map(len, kinds_of_step(load_run()).values())) == [2, 5]
    sampled = load_run(overrides=["schedule.kind=sampled", "schedule.phases=[]"])
    assert len(kinds_of_step(sampled)) == 5


def test_a_step_is_tried_and_nothing_moved_by_it(world_index):
    run = load_run(overrides=["batch.micro=8", "batch.global=24", "queue=24", "ray.workers=1"])
    torch.manual_seed(7)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    trial = try_step(run, "cpu")
    assert trial.pairs_per_s > 0 and trial.fits and not trial.problem
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
    assert samples_per_s(run, world_index) > 10
    if not torch.cuda.is_available():
        assert "sees no GPU" in try_step(run, "cuda").problem


# --- the command line -------------------------------------------------------------------------------------------------


def test_dry_run_shows_every_check_with_its_figures(no_ray, files, capsys, tmp_path):
    assert cli.pretrain_main(["--dry-run", *files]) == 0
    ready = [
        line.split(":")[0].split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines() if "ready" in line
    ]
    assert ready == [
        "CPUs", "storage", "data", "disk", "Ray's folder", "memory", "object store", "one batch",
        "decoding",
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_column_of_phrases_that_is_not_there_is_said_before_ray_starts(no_ray, files, capsys, tmp_path):
    keys = ["method=mvptr", "concepts.source=column", "tags.source=box_labels"]
    run, _ = preflight.check(load_run(overrides=[*files, *keys]))
    assert run.concepts.source == "column"
    bare = tmp_path / "bare.parquet"
    whole = pq.read_table(files[1].partition("[")[2].removesuffix("]"))
    pq.write_table(whole.drop_columns(["phrases"]), bare)
    for extra in ([], ["--dry-run"]):
        assert cli.pretrain_main([files[0], f"data.val=[{bare}]", *keys, *extra]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: data.val: no phrases in the first rows of {bare}, which concepts.source=column")
    preflight.check(load_run(overrides=[files[0], f"data.val=[{bare}]", "method=mvptr", "tags.source=box_labels"]))


def test_dry_run_says_all_misses_at_once(no_ray, files, good, capsys, monkeypatch):
    case = second(replace(good, storage=2**20), node={"ahead_s": 60.0}, storage_problem="not there")
    monkeypatch.setattr(preflight, "join", lambda run: JOINED)
    monkeypatch.setattr(preflight, "_look_around", lambda *_: case)
    assert cli.pretrain_main(["--dry-run", *files, "ray.address=10.0.0.1:6379"]) == 2
    out, error = capsys.readouterr()
    assert [line.split(": ")[1] for line in error.splitlines()] == ["clock", "storage", "storage"]
    assert "ready      CPUs: 8 on 2 nodes" in out and "ready      clocks" not in out
    assert "nothing was trained" not in out


def test_a_storage_under_a_file(no_ray, files, capsys, tmp_path):
    (tmp_path / "taken").touch()
    for extra in ([], ["--dry-run"]):
        assert cli.pretrain_main([*files, "storage=taken/runs", *extra]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.endswith("taken is a file; name another") and "storage: taken/runs cannot be a folder" in line


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small file system in memory."""
    there: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(there)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("this user cannot mount")
        there.append(folder)
        return folder

    yield mount
    for folder in there:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_storage_that_is_too_small_or_read_only(no_ray, files, capsys, mounted):
    small = mounted("size=2m")
    assert cli.pretrain_main([*files, f"storage={small}/runs", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"storage: 2 MiB free in {small}/runs, but two checkpoints take" in line
    assert list(small.iterdir()) == []
    read_only = mounted("size=2m,ro")
    assert cli.pretrain_main([*files, f"storage={read_only}/runs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"storage: {read_only}/runs cannot be written, because {read_only} is not writable; name another" in line
