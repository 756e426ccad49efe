"""A fabricated run's folder; its pictures are the built-in world's."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest

from simla_ray.config.load import load_run, to_yaml
from simla_ray.data.world import make_row

STEPS = 40
RECALL = {f"{d}_r{k}": v for d in ("i2t", "t2i") for k, v in ((1, 0.213), (5, 0.521), (10, 0.664))}
CHANCE = {f"{d}_r{k}": k / 500 for d in ("i2t", "t2i") for k in (1, 5, 10)}
EVAL: dict[str, dict[str, Any]] = {
    "data": {"n_rows": 501, "n_images": 500, "n_captions": 500, "dropped": {"image_unreadable": 1}},
    "retrieval": {
        "n_images": 500,
        "n_captions": 500,
        "chance": CHANCE,
        "itc": RECALL,
        "itc_satisfied": {k: v + 0.1 for k, v in RECALL.items()},
        "itm": RECALL | {"t2i_r10": 0.7194},
        "intervals": {"itm": {name: [value - 0.02, value + 0.024] for name, value in RECALL.items()}},
    },
    "match": {"n": 500, "auc_random": 0.972, "auc_hard": 0.783, "intervals": {"auc_random": [0.961, 0.981]}},
    "grounding": {
        "pointing": 0.697,
        "chance": 0.101,
        "center": 0.203,
        "random_object": 0.355,
        "n": 948,
        "box_accuracy": 0.655,
        "box_whole": 0.0,
        "box_middle": 0.012,
        "layers": [0, 1, 2],
        "skipped": {"no_words": 1},
        "candidate_accuracy": 0.838,
        "candidate_random": 0.3,
        "candidate_largest": 0.31,
        "candidate_n": 940,
        "intervals": {"pointing": [0.667, 0.727]},
    },
    "keywords": {"ap": 0.853, "baseline_ap": 0.371, "precision": 0.41, "recall": 0.62, "n": 490},
    "words": {"color_right": 0.554, "color_wrong": 0.121, "n": 640, "mlm_accuracy": 0.713, "mim_accuracy": 0.284},
    "classification": {
        "accuracy": 0.42,
        "class_accuracy": 0.38,
        "top5": 0.9,
        "n": 480,
        "classes": 8,
        "chance": 0.125,
        "majority": 0.31,
        "confused": [{"label": "ring", "predicted": "<b>star", "n": 12}],
        "intervals": {"accuracy": [0.38, 0.46]},
    },
    "ratings": {
        "itc": {"spearman": 0.412, "kendall": 0.301},
        "n": 900,
        "intervals": {"itc": {"spearman": [0.35, 0.47]}},
    },
}


def examples(pictures: bool) -> dict[str, list[dict[str, Any]]]:
    """What the evaluation writes, one or two cases of each task; the caption of the first is hostile."""
    rows = [make_row(0, "test", i, 48, 1) for i in range(4)]

    def shown(i: int) -> dict[str, str]:
        return {"image": base64.b64encode(rows[i]["image"]).decode()} if pictures else {}

    caption, uid = "<script>alert('x')</script> & a red ring", rows[0]["uid"]
    top = [
        {"uid": rows[i]["uid"], "score": 0.8 - i / 10, "right": i == 1, "satisfied": i > 0} | shown(i) for i in (2, 1)
    ]
    heat = [[0.1, 0.2, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 0.0]]
    boxes = rows[0]["phrases"][0]["boxes"]
    return {
        "retrieval": [
            {"uid": uid, "caption": caption, "rank": 2, "hit": False, "top": top} | shown(0),
            {"uid": uid, "caption": "a ring", "rank": 1217, "hit": False, "top": top[:1]} | shown(0),
        ],
        "grounding": [
            {
                "uid": uid,
                "phrase": "a <b>ring",
                "boxes": boxes,
                "heat": heat,
                "hit": True,
                "proposed": [0.1, 0.2, 0.5, 0.6],
                "iou": 0.4,
            }
            | shown(0),
            {"uid": uid, "phrase": "nothing", "boxes": boxes, "heat": [[0.0] * 3] * 3, "hit": False} | shown(1),
        ],
        "keywords": [
            {
                "uid": uid,
                "caption": caption,
                "said": ["red", "ring"],
                "selected": ["ring"],
                "recommended": ["blue", "star"],
                "true": ["blue", "small"],
            }
            | shown(0)
        ],
        "words": [
            {"uid": uid, "caption": "a [MASK] ring", "word": "red", "right": "red", "wrong": "<i>", "hit": True}
            | shown(0)
        ],
        "classification": [
            {
                "uid": uid,
                "label": "ring",
                "predicted": "<b>star",
                "hit": False,
                "top": [{"label": "<b>star", "score": 0.51}, {"label": "ring", "score": None}],
            }
            | shown(0)
        ],
        "ratings": [
            {"uid": uid, "caption": caption, "rating": 3.25, "place": 0.9, "human_place": 0.75, "itc": 0.2, "hit": True}
            | shown(0)
        ],
        "match": [
            {
                "uid": uid,
                "caption": caption,
                "logit": 2.125,
                "hit": True,
                "wrong": {"uid": rows[1]["uid"], "logit": None} | shown(1),
            }
            | shown(0)
        ],
    }


def train_line(step: int, names: tuple[str, ...]) -> dict[str, Any]:
    line: dict[str, Any] = {
        "step": step,
        "kind": "train",
        "metrics": {},
        "grad_norm": 1.0,
        "skipped": False,
        "lr": 1e-3,
    }
    line["losses"] = {name: 1 + math.exp(-step / 10) for name in names} | {"total": 9.0}
    if step % 10 == 0:
        line |= {"seconds": step / 4, "epochs": step / 20, "pairs_per_s": 256.0, "data_wait_fraction": 0.021}
        line |= {"dropped": 2, "truncated_fraction": 0.5}
    return line


def fabricate(
    folder: Path, overrides: dict[str, Any] | None = None, tasks: tuple[str, ...] = tuple(EVAL), pictures=True
):
    """Write a finished run's folder; ``overrides`` change its config, ``tasks`` say what was evaluated."""
    folder.mkdir(parents=True)
    run = load_run(
        [], {"size": "tiny", "name": folder.name, "optim.lr": 0.00213, "optim.max_steps": STEPS} | (overrides or {})
    )
    names = tuple(run.objectives.active())
    metrics = [train_line(step, names) for step in range(1, STEPS + 1)]
    for step in (20, 40):
        values = {f"{name}_hard": 1.5 for name in names} | {f"{name}_accuracy": 0.4 for name in names if name != "psl"}
        metrics.append({"step": step, "kind": "val", "metrics": values | {"retrieval_r10": 0.6}})
    found = examples(pictures)
    evaluation = {
        task: {
            "metrics": {name: value for name, value in EVAL[task].items() if name != "intervals"},
            "intervals": EVAL[task].get("intervals", {}),
            "examples": found.get(task, []),
        }
        for task in tasks
    }
    drops = [
        {"step": 3, "uid": "world-train-000<7>", "reason": "image_unreadable", "epoch": 0},
        {"step": 23, "uid": "world-train-000<7>", "reason": "image_unreadable", "epoch": 1},
        {"step": 9, "uid": "world-train-000011", "reason": "caption_empty", "epoch": 0},
    ]
    (folder / "config.yaml").write_text(to_yaml(run))
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "dropped.jsonl", drops)
    write_lines(
        folder / "events.jsonl",
        [{"time": 1.0, "event": "start", "step": 0}, {"time": 2.0, "event": "resume", "step": 20}],
    )
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    manifest = {
        "label": run.label,
        "git_sha": "4f1c9d27b0a3",
        "packages": {"torch": "2.13.0", "ray": "2.60.0"},
        "data": {"train": {"uris": ["world:train"], "split": None, "rows": 12000, "fingerprint": "a1b2c3d4"}},
        "world_size": 2,
        "cluster": {"nodes": 1, "cpus": 4, "gpus": 0},
        "fallbacks": ["visual codes: 128 kmeans codes in place of DALL-E's 8192"],
        "licenses": ["CC0-1.0"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "summary.json").write_text(json.dumps(summary_of(run, tasks)))
    return folder


def summary_of(run, tasks: tuple[str, ...] = tuple(EVAL)) -> dict[str, Any]:
    return {
        "name": run.name,
        "label": run.label,
        "method": "simla",
        "size": "tiny",
        "steps": STEPS,
        "epochs": 2.0,
        "samples_seen": STEPS * 64,
        "seconds": 3723.4,
        "pairs_per_s": 256.0,
        "data_wait_fraction": 0.021,
        "world_size": 2,
        "restarts": 1,
        "best_step": 20,
        "dropped": {"caption_empty": 1, "image_unreadable": 1},
        "losses": {name: {"first": 3.4321, "last": 0.01234} for name in run.objectives.active()},
        "eval": {task: EVAL[task] for task in tasks},
    }


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "simla-tiny-001")
