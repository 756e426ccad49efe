from simla_ray.evaluation.table import table
from simla_ray.types import EvalResult


def cells(value):
    return {f"{d}_r{k}": value * k / 10 for d in ("i2t", "t2i") for k in (1, 5, 10)}


def test_table():
    results = {
        "data": EvalResult(
            "data", {"n_rows": 1201, "n_images": 1200, "n_captions": 2400, "dropped": {"image_missing": 1}}
        ),
        "retrieval": EvalResult("retrieval", {"itc": cells(0.5), "itm": cells(0.6), "chance": cells(0.1)}),
        "match": EvalResult("match", {"auc_random": 0.9, "n": 1200}),
        "grounding": EvalResult("grounding", {"pointing": 0.7, "chance": 0.1, "center": 0.2, "n": 900}),
        "keywords": EvalResult("keywords", {"ap": 0.6, "baseline_ap": 0.4, "precision": 0.3, "recall": 0.5, "n": 1100}),
        "words": EvalResult("words", {"color_right": 0.62, "color_wrong": 0.11, "n": 800, "mlm_accuracy": 0.5}),
    }
    assert table(results).splitlines() == [
        "1,200 images with 2,400 captions, of 1,201 rows; values in per cent",
        "dropped rows: image_missing 1",
        "task       measure                                            value  baseline",
        "retrieval  image to text R@1 5 10, ITC              5.0  25.0  50.0    1.0   5.0  10.0 chance",
        "retrieval  text to image R@1 5 10, ITC              5.0  25.0  50.0    1.0   5.0  10.0 chance",
        "retrieval  image to text R@1 5 10, ITM re-ranked    6.0  30.0  60.0    1.0   5.0  10.0 chance",
        "retrieval  text to image R@1 5 10, ITM re-ranked    6.0  30.0  60.0    1.0   5.0  10.0 chance",
        "match      AUC, random negatives                               90.0  50.0 chance",
        "grounding  pointing, 900 phrases                               70.0  10.0 any patch, 20.0 centre",
        "keywords   unsaid words, AP, 1,100 images                      60.0  40.0 word frequency",
        "keywords   recommended words, precision                        30.0",
        "keywords   recommended words, recall                           50.0",
        "words      masked colour words, 800                            62.0  11.0 over another image",
        "words      masked words                                        50.0",
    ]


def test_nothing_but_the_head():
    head = {"n_rows": 2, "n_images": 1, "n_captions": 1, "dropped": {}}
    assert (
        table({"data": EvalResult("data", head)}).splitlines()[0]
        == "1 images with 1 captions, of 2 rows; values in per cent"
    )
