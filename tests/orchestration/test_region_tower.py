"""Features of regions from one's own run: the tower is found, loaded, frozen, and part of the checkpoint."""

import shutil

import pytest
import torch

from simla_ray.config.load import load_finetuning, load_run, to_yaml
from simla_ray.data.cursor import Cursor
from simla_ray.errors import UserError
from simla_ray.models.checkpoint_io import load_strict, save_tensors
from simla_ray.models.model import Model
from simla_ray.orchestration import preflight
from simla_ray.orchestration.region_fallbacks import uniter_fallbacks
from simla_ray.orchestration.region_tower import load_region_tower, with_tower
from simla_ray.orchestration.runs import check_same_run
from simla_ray.training.comm import Comm
from simla_ray.training.measure import synthetic_batch
from simla_ray.training.optim import build_optimizer, named_parameters
from simla_ray.training.saver import Saver
from simla_ray.training.state import State
from simla_ray.training.step import Losses, Step

V = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported run of CLIP's, 48 px in patches of 8."""
    folder = tmp_path_factory.mktemp("exported") / "mine"
    (folder / "prepared").mkdir(parents=True)
    run = load_run(overrides=["method=clip"])
    (folder / "config.yaml").write_text(to_yaml(run))
    torch.manual_seed(5)
    save_tensors(Model(run, V).state_dict(), folder / "model.safetensors")
    return folder


def tower_run(weights, *keys):
    base = ["method=uniter-grid", "regions.features=tower", f"regions.weights={weights}", "batch.micro=4"]
    return load_run(overrides=[*base, "batch.global=8", "ray.workers=1", *keys])


def test_features_are_the_towers_tokens_where_cells_are_its_patches(folder):
    run = with_tower(tower_run(folder, "regions.grid=6"))
    assert run.regions.tower.width == 64 and not run.regions.tower.pretrained
    model = Model(run, V)
    load_region_tower(model, run)
    other = load_run(overrides=["method=clip"])
    torch.manual_seed(5)
    theirs = Model(other, V).eval().student.vision
    image = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    vision = model.student.vision
    with torch.no_grad():
        tokens = theirs(image)[:, 1:]
    torch.testing.assert_close(vision.look(image, None, vision.cells.expand(2, -1, -1)), tokens, rtol=1e-4, atol=1e-5)
    assert any("mine's frozen tower" in line for line in uniter_fallbacks(run))


def test_a_step_leaves_it_as_it_is_and_a_checkpoint_has_it(folder):
    run = with_tower(tower_run(folder, "regions.grid=3"))
    model = Model(run, V)
    load_region_tower(model, run)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    step = Step(run, Losses(run, model, None, 1, None).train(), 4, Comm(), torch.device("cpu"))
    for i in range(2):
        assert step(i, [(n, synthetic_batch(run, V, seed=n)) for n in (0, 1)]).grad_norm.isfinite()
    tower = "student.vision.features."
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved and not any(n.startswith(tower) for n in moved)
    assert any(n.startswith(tower) for n in before) and not any(n.startswith(tower) for n, _ in named_parameters(model))
    again = Model(run, V)
    load_strict(again, model.state_dict(), folder)
    assert not again.student.vision.features.tower.training


def needed(run):
    return [file.key for file in preflight._needed_files(run, None)]


def test_a_run_that_goes_on_needs_the_tower_no_more(folder, vocabulary, tmp_path, monkeypatch):
    """Its checkpoint holds it; a run without a checkpoint, or of another tower, still has to find it."""
    monkeypatch.chdir(tmp_path)
    theirs, mine = tmp_path / "theirs", tmp_path / "runs" / "going"
    shutil.copytree(folder, theirs)
    keys = (f"storage={tmp_path / 'runs'}", "name=going")
    run = preflight.with_tower(preflight.with_absolute_paths(tower_run("theirs", *keys)))
    assert run.regions.weights == str(theirs) and "regions.weights" in needed(run)
    (mine / "prepared").mkdir(parents=True)
    (mine / "config.yaml").write_text(to_yaml(run))
    vocabulary.save(mine / "prepared")
    model = Model(run, len(vocabulary))
    load_region_tower(model, run)
    asked = [preflight.with_absolute_paths(tower_run(weights, *keys)) for weights in ("theirs", theirs)]
    saver = Saver(mine / "checkpoints", run, model, build_optimizer(model, run.optim), mine / "prepared")
    saver(State(3, Cursor.start(run.micro_batches), best_step=3))
    assert saver.finished(wait=True)[0].error is None
    shutil.rmtree(theirs)
    asked += [preflight.with_absolute_paths(tower_run(weights, *keys)) for weights in ("theirs", theirs)]
    for again in asked:
        found = with_tower(again)
        assert found.regions == run.regions and "regions.weights" not in needed(found)
        check_same_run(found)
    with pytest.raises(UserError, match=r"^regions\.weights: .*others.*no run there"):
        with_tower(tower_run("others", *keys))
    with pytest.raises(UserError, match=r"^regions\.weights: .*theirs.*no run there"):
        with_tower(tower_run(theirs, keys[0], "name=another"))
    shutil.rmtree(mine / "checkpoints")
    with pytest.raises(UserError, match=r"^regions\.weights: .*theirs.*no run there"):
        with_tower(tower_run(theirs, *keys))


def test_what_is_fine_tuned_brings_its_tower(folder):
    start = with_tower(tower_run(folder))
    run = load_finetuning(start, overrides=["task=retrieval", "init_from=there"])
    assert run.regions.weights is None and run.regions.tower == start.regions.tower == with_tower(run).regions.tower
    assert "regions.weights" not in needed(run)
    assert any("patches of a frozen tower" in line for line in uniter_fallbacks(run))
    model = Model(run, V)
    before = {n: t.clone() for n, t in model.student.vision.features.state_dict().items()}
    load_region_tower(model, run)
    assert before and all(torch.equal(t, before[n]) for n, t in model.student.vision.features.state_dict().items())
    with pytest.raises(UserError, match=r"^regions\.weights: None with regions\.features=tower"):
        load_run(overrides=["method=uniter-grid", "regions.features=tower", "regions.tower={}"])


def test_what_cannot_be_one_is_said_in_a_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"regions\.weights: .* sees images of 48 px, this run vision\.image_px=96"):
        with_tower(tower_run(folder, "vision.image_px=96"))
    with pytest.raises(UserError, match=r"regions\.weights: .*no run there.*nor is it a timm model"):
        with_tower(tower_run(tmp_path / "nothing"))
    assert with_tower(tower_run("vit_tiny_patch16_224")).regions.tower.patch_px == 16
    assert with_tower(load_run(overrides=["method=uniter"])).regions.tower is None


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["regions.features=tower"], "regions.weights: None with regions.features=tower; name a run"),
        (["regions.weights=x"], "regions.weights: x with regions.features=pixels; set it to null"),
        (["regions.source=column", "regions.features=tower", "regions.weights=x"], "has its own features; use pixels"),
        (["vision.weights=x"], "vision.weights: x has no tower to go to with vision.source=regions"),
    ],
)
def test_rules(keys, line):
    with pytest.raises(UserError) as error:
        load_run(overrides=["method=uniter", *keys])
    assert line in str(error.value)
