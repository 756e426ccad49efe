from simla_ray.evaluation.table import table
from simla_ray.types import EvalResult


def cells(value):
    return {f"{d}_r{k}": value * k / 10 for d in ("i2t", "t2i") for k in (1, 5, 10)}


def ends(value):
    return {name: [v - 0.01, v + 0.012] for name, v in cells(value).items()}


def test_table():
    results = {
        "data": EvalResult(
            "data",
            {
                "n_rows": 1201,
                "n_images": 1200,
                "n_captions": 2400,
                "dropped": {"image_missing": 1},
                "not_run": {"psl": "no objective psl", "ratings": "no --ratings"},
            },
        ),
        "retrieval": EvalResult(
            "retrieval", {"itc": cells(0.5), "itm": cells(0.9), "chance": cells(0.1)}, [], {"itm": ends(0.9)}
        ),
        "match": EvalResult("match", {"auc_random": 0.9, "n": 1200}, [], {"auc_random": [0.87, 0.9123]}),
        "grounding": EvalResult("grounding", {"pointing": 0.7, "chance": 0.1, "center": 0.2, "n": 900}),
        "keywords": EvalResult(
            "keywords",
            {"ap": 0.6, "baseline_ap": 0.4, "precision": 0.3, "recall": 0.5, "n": 1100},
            [],
            {"ap": [0.5, 0.7]},
        ),
        "words": EvalResult("words", {"color_right": 0.62, "color_wrong": 0.11, "n": 800, "mlm_accuracy": 0.5}),
        "classification": EvalResult(
            "classification",
            {"accuracy": 0.4, "class_accuracy": 0.3, "top5": 0.8, "classes": 10, "n": 90, "chance": 0.1,
             "majority": 0.25, "unlabelled": 0, "confused": []},
            [],
            {"accuracy": [0.3, 0.5]},
        ),
        "ratings": EvalResult(
            "ratings",
            {"itm": {"spearman": 0.5, "kendall": -0.25}, "n": 60, "n_images": 20, "dropped": {"image_unknown": 2}},
            [],
            {"itm": {"spearman": [0.4, 0.6]}},
        ),
    }  # fmt: skip
    lines = table(results).splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "1,200 images with 2,400 captions, of 1,201 rows; values in per cent",
        "dropped rows: image_missing 1",
        "task measure value baseline",
        "retrieval image to text R@1 5 10, ITC 5.0 25.0 50.0",
        "retrieval text to image R@1 5 10, ITC 5.0 25.0 50.0",
        "retrieval image to text R@1 5 10, ITM re-ranked 9.0 [8.0, 10.2] 45.0 [44.0, 46.2] 90.0 [89.0, 91.2]",
        "retrieval text to image R@1 5 10, ITM re-ranked 9.0 [8.0, 10.2] 45.0 [44.0, 46.2] 90.0 [89.0, 91.2]",
        "retrieval image to text R@1 5 10, chance 1.0 5.0 10.0",
        "retrieval text to image R@1 5 10, chance 1.0 5.0 10.0",
        "match AUC, random negatives 90.0 [87.0, 91.2] 50.0 chance",
        "grounding pointing, 900 phrases 70.0 10.0 any patch, 20.0 centre",
        "keywords unsaid words, AP, 1,100 images 60.0 [50.0, 70.0] 40.0 word frequency",
        "keywords recommended words, precision 30.0",
        "keywords recommended words, recall 50.0",
        "words masked colour words, 800 62.0 11.0 over another image",
        "words masked words 50.0",
        "classification 10 classes, 90 images 40.0 [30.0, 50.0] 10.0 chance, 25.0 majority",
        "classification mean of the classes 30.0 10.0 chance",
        "classification true class among the first 5 80.0 50.0 chance",
        "ratings Spearman, Kendall of ITM, 60 pairs 0.500 [0.400, 0.600] -0.250",
        "ratings dropped ratings image_unknown 2",
        "not run: psl (no objective psl), ratings (no --ratings)",
    ]
    starts = [lines[2].index(head) for head in ("measure", "value", "baseline")]
    beside = [line for line in lines[3:-1] if not line.startswith(("retrieval", "ratings"))]
    assert all(line[start - 2 : start] == "  " for line in beside for start in starts if len(line) > start)
    assert {line.index("[44.0") for line in lines if "[44.0" in line} == {starts[1] + 26}
    assert max(map(len, lines)) <= 120


def test_nothing_but_the_head():
    head = {"n_rows": 2, "n_images": 1, "n_captions": 1, "dropped": {}}
    assert (
        table({"data": EvalResult("data", head)}).splitlines()[0]
        == "1 images with 1 captions, of 2 rows; values in per cent"
    )


def test_grounding_with_boxes():
    metrics = {
        "pointing": 0.7, "chance": 0.1, "center": 0.2, "box_accuracy": 0.6, "box_whole": 0.0, "box_middle": 0.01,
        "candidate_accuracy": 0.8, "candidate_random": 0.3, "candidate_largest": 0.25, "n": 1900, "candidate_n": 1500,
        "layers": [0, 2], "skipped": {"no_words": 2, "box_clipped": 1200},
    }  # fmt: skip
    result = EvalResult("grounding", metrics, intervals={"pointing": [0.65, 0.75]})
    assert table({"grounding": result}).splitlines()[1:] == [
        "grounding  pointing, 1,900 phrases, layers 0, 2   70.0 [65.0, 75.0]  10.0 any patch, 20.0 centre",
        "grounding  box from the map, IoU 0.5              60.0               0.0 whole image, 1.0 middle",
        "grounding  box of candidates, 1,500 phrases       80.0               30.0 any, 25.0 largest",
        "grounding  phrases and boxes not used                                no_words 2, box_clipped 1200",
    ]
