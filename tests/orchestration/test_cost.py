"""FLOPs of a step: by hand, between methods, and over the phases of a run."""

import pytest

from simla_ray.config.load import load_run
from simla_ray.orchestration.cost import shares_of_steps, step_flops

V = 256


def load(method="simla", **keys):
    """With few layers, each of which takes its time to be counted."""
    few = {"vision.depth": 1} | ({} if method in ("uniter", "uniter-grid") else {"text.depth": 2})
    given = {k.replace("__", "."): v for k, v in keys.items()}
    return load_run(overrides={"method": method, "size": "tiny"} | few | given)


JOINT = {"schedule__kind": "joint", "schedule__phases": []}


def test_methods_cost_what_they_do_more():
    cost = {method: step_flops(load(method), V) for method in ("clip", "albef", "simla")}
    assert cost["clip"] < cost["albef"] < cost["simla"]
    without = {name: step_flops(load(**{f"objectives__{name}": None}), V) for name in ("mim", "psl")}
    assert cost["albef"] < min(without.values()) and max(without.values()) < cost["simla"]


def test_a_layer_more_by_hand():
    """CLIP's text layer: four projections, the products of attention and two of the FFN; three times with backward."""
    run = load("clip")
    D, L, ffn = run.text.width, run.text.max_tokens, run.text.ffn
    layer = 2 * L * (4 * D * D + 2 * D * ffn) + 2 * 2 * L * L * D
    deeper = load("clip", text__depth=run.text.depth + 1)
    assert step_flops(deeper, V) - step_flops(run, V) == pytest.approx(3 * layer, rel=1e-9)


def test_a_layer_of_the_image_tower_more_by_hand():
    run = load("clip")
    N, D = run.grid**2 + 1, run.vision.width
    hidden = int(D * run.vision.mlp_ratio)
    layer = 2 * N * (4 * D * D + 2 * D * hidden) + 2 * 2 * N * N * D
    deeper = load("clip", vision__depth=run.vision.depth + 1)
    assert step_flops(deeper, V) - step_flops(run, V) == pytest.approx(3 * layer, rel=1e-9)


def test_twice_the_depth_is_twice_the_text_stack():
    two, four, eight = (step_flops(load(text__depth=depth, **JOINT), V) for depth in (2, 4, 8))
    assert eight - four == pytest.approx(2 * (four - two), rel=1e-9)


def test_a_teacher_is_counted():
    off = {f"objectives__{name}__soft_alpha": 0 for name in ("itc", "mlm", "mim", "psl")}
    with_teacher = step_flops(load(**JOINT), V)
    without = step_flops(load(**JOINT, **off, teacher=None, objectives__psl__attention="student"), V)
    assert with_teacher > 1.1 * without


def test_the_visual_tokenizer_is_counted_by_hand():
    """Products with twice as many centroids, and a head with twice as many codes."""
    mim = {"objectives__mim__batch_fraction": 1.0, "objectives__mim__soft_alpha": 0}
    few, many = (load(codes__n=n, **JOINT, **mim) for n in (64, 128))
    P, D, d = few.grid**2, few.text.width, 3 * few.vision.patch_px**2
    masked = int(few.objectives.mim.mask_ratio * P)
    more = step_flops(many, V) - step_flops(few, V)
    assert more >= 64 * 2 * P * d
    head = 3 * 64 * 2 * D * masked
    assert more == pytest.approx(64 * 2 * P * d + head, rel=0.1)


@pytest.mark.parametrize(("kind", "n"), [("dvae", 8192), ("features", 16)])
def test_a_tokenizer_with_layers_costs_more_than_pixels(kind, n):
    assert step_flops(load(codes__kind=kind, codes__source="x", codes__n=n), V) > 1.01 * step_flops(load(codes__n=n), V)


def test_phases_count_by_their_share():
    joint, first = (
        step_flops(load(**JOINT), V),
        step_flops(load(schedule__kind="phases", schedule__phases=phases("itc", 1)), V),
    )
    half = step_flops(load(schedule__kind="phases", schedule__phases=phases("itc", 0.5)), V)
    assert half == pytest.approx((joint + first) / 2)


def phases(name, until):
    every = ["itc", "itm", "mlm", "mim", "psl"]
    later = [] if until == 1 else [{"until": 1.0, "objectives": every}]
    return [{"until": until, "objectives": [name]}, *later]


def test_psl_counts_from_its_first_step():
    late = load(objectives__psl__start_step=250, **JOINT)
    every = frozenset({"itc", "itm", "mlm", "mim", "psl"})
    assert shares_of_steps(late, 1000) == {every - {"psl"}: 0.25, every: 0.75}
    cost = [step_flops(late, V, steps) for steps in (250, 500, 1000)]
    assert cost[1] - cost[0] == pytest.approx(2 * (cost[2] - cost[1]))
    never = step_flops(load(objectives__psl__start_step=1000, **JOINT), V, 1000)
    assert cost[0] == pytest.approx(never)


def test_sampled_objectives_count_by_their_mix():
    run = load(schedule__kind="sampled", schedule__phases=[], schedule__mix={"itc": 3.0, "mim": 0.0})
    shares = {name: share for (name,), share in shares_of_steps(run, 100).items()}
    assert shares == pytest.approx({"itc": 0.5, "itm": 1 / 6, "mlm": 1 / 6, "psl": 1 / 6})
    late = load(schedule__kind="sampled", schedule__phases=[], objectives__psl__start_step=50)
    shares = {name: share for (name,), share in shares_of_steps(late, 100).items()}
    assert shares == pytest.approx({"psl": 0.1} | dict.fromkeys(("itc", "itm", "mlm", "mim"), 0.5 / 4 + 0.1))


def test_it_is_of_a_pair_whatever_saves_memory():
    run = load("albef")
    twice = load("albef", batch__micro=64, batch__global=64, ray__workers=1)
    assert step_flops(twice, V) == pytest.approx(step_flops(run, V), rel=0.01)  # more negatives of a caption
    assert step_flops(load("albef", activation_checkpointing=True), V) == step_flops(run, V)


def test_the_length_of_the_run_has_to_be_known():
    run = load(optim__max_steps=None)
    with pytest.raises(ValueError, match=r"optim\.max_steps is null"):
        step_flops(run, V)
    assert step_flops(run, V, 1000) == pytest.approx(step_flops(load(), V))


def test_regions_are_counted_wherever_they_come_from():
    """A region more is a token more in every layer; annotated classes and codes cost about the same."""
    sampled = {"schedule": {"kind": "sampled", "phases": [], "mix": {"mlm": 1, "itm": 1, "mrfr": 1, "mrckl": 1}}}
    few, many = (step_flops(load("uniter", regions__source="boxes", regions__max=n, **sampled), V) for n in (4, 8))
    grid = step_flops(load("uniter-grid", **sampled), V)
    assert few < many < grid
    column = step_flops(load("uniter", regions__source="column", regions__width=192, regions__max=8, **sampled), V)
    assert few < column < many  # features that are given are not made
    named = step_flops(load("uniter", regions__source="boxes", regions__classes=["a"] * 128, **sampled), V)
    assert named == pytest.approx(many, rel=0.05)
    joint = step_flops(load("uniter-grid", schedule={"kind": "joint", "phases": [], "mix": None}), V)
    assert joint > 2 * grid
