"""simla_ray.load: the same numbers as the run's own, for every way to give a picture, batch by batch."""

import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import simla_ray
from simla_ray.data.augment import evaluation_view, to_array
from simla_ray.data.decode import decode
from simla_ray.data.text import Vocabulary
from simla_ray.errors import UserError
from simla_ray.evaluation.boxes import propose
from simla_ray.evaluation.grad_cam import grad_cam
from simla_ray.evaluation.scorer import Scorer
from simla_ray.orchestration.runs import load_trained
from simla_ray.release.export import export
from simla_ray.release.source import find_source

from .conftest import make_run_folder

TEXTS = ["a red circle", "there is a large blue star", "A green ring, left of it a square!", "a"]


@pytest.fixture(scope="module")
def model(exported):
    return simla_ray.load(exported)


@pytest.fixture(scope="module")
def pictures(world_rows):
    return [row["image"] for row in world_rows["test"][:7]]


@pytest.fixture(scope="module")
def scorer(run_folder, vocabulary):
    """The run's own model, with teacher and queue."""
    run, model, _ = load_trained(run_folder)
    return Scorer(run, model, vocabulary, torch.device("cpu"))


@pytest.fixture(scope="module")
def views(pictures):
    return np.stack([to_array(evaluation_view(decode(p, 10**7), 48)) for p in pictures])


def test_embeddings_equal_the_runs_bit_by_bit(model, scorer, pictures, views):
    images, texts = model.encode_image(pictures), model.encode_text(TEXTS)
    assert torch.equal(images, scorer.encode_images(views)[1])
    assert torch.equal(texts, scorer.encode_texts(TEXTS)[2])
    assert images.dtype == torch.float32 and images.shape == (7, 64) and not images.requires_grad
    torch.testing.assert_close(images.norm(dim=1), torch.ones(7))


def test_a_run_that_is_not_exported_opens_the_same(run_folder, model, pictures):
    assert torch.equal(
        simla_ray.load(str(run_folder), device="cpu").encode_image(pictures), model.encode_image(pictures)
    )


def test_matches_are_the_itm_heads(model, scorer, pictures, views):
    texts = [TEXTS[i % 4] for i in range(7)]
    tokens, _ = scorer.encode_images(views)
    ids, mask = scorer.tokenize(texts)
    expected = scorer.match_logits(tokens, torch.arange(7), ids, mask).sigmoid()
    assert torch.allclose(model.match(pictures, texts), expected, atol=1e-6)  # of pictures that are encoded in batches
    assert model.match(pictures[0], "a red circle").shape == (1,)


def test_heat_maps_are_those_of_the_evaluation(model, scorer, pictures, views):
    phrases = ["a red circle"] * 7
    tokens, _ = scorer.encode_images(views)
    expected = grad_cam(scorer, tokens, torch.arange(7), *scorer.tokenize(phrases))
    maps = model.ground(pictures, phrases)
    assert maps.shape == (7, 6, 6) and not maps.requires_grad and (maps >= 0).all() and maps.max() > 0
    torch.testing.assert_close(maps.flatten(1), expected)


def test_boxes_are_read_off_the_map(model, pictures):
    found = model.ground_boxes(pictures[0], "A red circle!")
    assert found.phrase == "A red circle!" and found.heat.shape == (6, 6)
    np.testing.assert_allclose(found.heat, model.ground(pictures[0], "a red circle")[0])
    boxes, scores = propose(found.heat)
    assert np.array_equal(found.boxes, boxes) and np.array_equal(found.scores, scores) and len(boxes)
    y, x = np.unravel_index(found.heat.argmax(), (6, 6))
    x1, y1, x2, y2 = boxes[0] * 6
    assert x1 < x + 0.5 < x2 and y1 < y + 0.5 < y2
    assert found.match == pytest.approx(model.match(pictures[0], "a red circle").item())
    with pytest.raises(UserError, match=r"'\.\.\.': a phrase without a word"):
        model.ground_boxes(pictures[0], "...")


def test_maps_of_single_layers_add_up(model, pictures):
    parts = [model.ground(pictures[:2], TEXTS[:2], layers=[i]) for i in range(3)]
    torch.testing.assert_close(sum(parts), model.ground(pictures[:2], TEXTS[:2]))
    with pytest.raises(UserError, match="layers: 7 does not read the image; those that do: 0, 1, 2"):
        model.ground_boxes(pictures[0], "a", layers=(7,))


def test_keywords_are_likely_words(model, scorer, pictures, views, vocabulary):
    found = model.keywords(pictures, top_k=5)
    assert [len(words) for words in found] == [5] * 7
    with torch.no_grad():
        logits = scorer.model.student.concept_head(scorer.encode_images(views)[1])
    for i, words in enumerate(found):
        values = [p for _, p in words]
        assert values == sorted(values, reverse=True) and all(0 <= p <= 1 for p in values)
        word, p = words[0]
        assert word in vocabulary.frequency and word not in ("a", "the")
        assert p == pytest.approx(logits[i, vocabulary.word_ids(word)].mean().sigmoid().item(), rel=1e-5)
    assert len(model.keywords(pictures[0], top_k=10_000)[0]) < len(vocabulary.frequency)


def test_batches_change_nothing(model, pictures):
    texts = [TEXTS[i % 4] for i in range(7)]
    close = torch.testing.assert_close
    close(model.encode_image(pictures, batch_size=2), model.encode_image(pictures))
    close(model.encode_text(texts, batch_size=3), model.encode_text(texts))
    close(model.match(pictures, texts, batch_size=3), model.match(pictures, texts))
    close(model.ground(pictures, texts, batch_size=3), model.ground(pictures, texts), atol=1e-6, rtol=1e-4)
    assert [[w for w, _ in row] for row in model.keywords(pictures, batch_size=3)] == [
        [w for w, _ in row] for row in model.keywords(pictures)
    ]


def test_a_picture_given_several_times_is_encoded_once(model, pictures, monkeypatch):
    expected = model.match([pictures[0], pictures[1], pictures[0]], TEXTS[:3])
    counted = []
    encode = model.scorer.image_tokens
    monkeypatch.setattr(model.scorer, "image_tokens", lambda views: counted.append(len(views)) or encode(views))
    opened = Image.open(io.BytesIO(pictures[0]))
    torch.testing.assert_close(model.match([opened, pictures[1], opened], TEXTS[:3]), expected)
    assert counted == [2]


def test_every_way_to_give_a_picture(model, pictures, tmp_path):
    image = Image.open(io.BytesIO(pictures[0])).convert("RGB")
    image.save(tmp_path / "a.png")
    ways = [
        image, np.asarray(image), tmp_path / "a.png", str(tmp_path / "a.png"), (tmp_path / "a.png").read_bytes(),
        image.convert("RGBA"), Image.open(tmp_path / "a.png"),
    ]  # fmt: skip
    vectors = model.encode_image(ways)
    assert torch.equal(vectors, vectors[:1].expand(len(ways), -1))
    for way in ways:
        assert model.encode_image(way).shape == (1, 64)
    grey = np.zeros((5, 9), np.uint8)
    torch.testing.assert_close(model.encode_image(grey), model.encode_image(np.stack([grey] * 3, -1)))
    turned = Image.new("RGB", (20, 10))
    turned.paste((255, 0, 0), (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    by_path, by_pil = model.encode_image([tmp_path / "turned.jpg", Image.open(tmp_path / "turned.jpg")])
    assert torch.equal(by_path, by_pil)


def test_nothing_in_nothing_out(model):
    assert model.encode_image([]).shape == (0, 64) and model.encode_text([]).shape == (0, 64)
    assert model.match([], []).shape == (0,) and model.ground([], []).shape == (0, 6, 6)
    assert model.keywords([]) == []


def test_bad_pictures_are_named(model, pictures, tmp_path):
    (tmp_path / "noise.png").write_bytes(b"noise")
    cut = tmp_path / "cut.png"
    cut.write_bytes(pictures[0][: len(pictures[0]) // 2])
    huge = Image.new("L", (10_000, 6_000))
    for bad, message in (
        (tmp_path / "gone.png", r"picture 1 \(.*gone\.png\): image_missing"),
        (str(tmp_path / "noise.png"), r"picture 1 \(.*noise\.png\): image_unreadable"),
        (b"noise", "picture 1: image_unreadable"),
        (Image.open(cut), "picture 1: image_unreadable"),
        (huge, "picture 1: image_too_large"),
        (np.zeros((4, 4, 3)), r"picture 1: a float64 array of shape \(4, 4, 3\); give uint8"),
        (np.zeros((2, 3, 4, 4), np.uint8), "picture 1: a uint8 array of shape"),
        (3, "picture 1: a int; give a PIL image"),
    ):
        with pytest.raises(UserError, match=message):
            model.encode_image([pictures[0], bad])
        with pytest.raises(UserError, match=message):
            model.match([pictures[0], bad], ["a", "b"], batch_size=1)


def test_pairs_must_be_pairs(model, pictures):
    with pytest.raises(UserError, match="2 pictures and 1 texts; they are paired one by one"):
        model.match(pictures[:2], ["a"])


def test_a_run_without_a_head_says_so(tmp_path, vocabulary, pictures):
    folder, _ = make_run_folder(tmp_path / "clip", vocabulary, method="clip", queue=0)
    export(find_source(folder), tmp_path / "out")
    model = simla_ray.load(tmp_path / "out")
    assert model.encode_image(pictures).shape == (7, 64) and model.encode_text("a").shape == (1, 64)
    for call in (lambda: model.match(pictures[0], "a"), lambda: model.ground(pictures[0], "a")):
        with pytest.raises(UserError, match="clip-tiny was trained without itm"):
            call()
    with pytest.raises(UserError, match="clip-tiny was trained without psl, so it has no concept_head"):
        model.keywords(pictures[0])


def test_albef_runs_open_too(tmp_path, vocabulary, pictures):
    folder, _ = make_run_folder(tmp_path / "albef", vocabulary, method="albef", schedule__kind="joint",
                                schedule__phases=[])  # fmt: skip
    export(find_source(folder), tmp_path / "out")
    model, (run, trained, _) = simla_ray.load(tmp_path / "out"), load_trained(folder)
    scorer = Scorer(run, trained, vocabulary, torch.device("cpu"))
    assert torch.equal(model.encode_text(TEXTS), scorer.encode_texts(TEXTS)[2])
    maps = model.ground(pictures[:2], TEXTS[:2])
    assert maps.shape == (2, 6, 6) and maps.max() > 0
    assert model.match(pictures[:2], TEXTS[:2]).shape == (2,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same(tmp_path, vocabulary, pictures):
    folder, _ = make_run_folder(tmp_path / "run", vocabulary, precision="fp32")
    cpu, gpu = simla_ray.load(folder, device="cpu"), simla_ray.load(folder, device="cuda")
    texts = [TEXTS[i % 4] for i in range(7)]
    for ours, theirs in (
        (gpu.encode_image(pictures), cpu.encode_image(pictures)),
        (gpu.encode_text(texts), cpu.encode_text(texts)),
        (gpu.match(pictures, texts), cpu.match(pictures, texts)),
        (gpu.ground(pictures, texts), cpu.ground(pictures, texts)),
    ):
        assert ours.is_cuda
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
    assert len(gpu.keywords(pictures)) == 7


def test_what_cannot_be_opened_is_one_line(tmp_path, exported):
    torch.save({"w": torch.zeros(1)}, tmp_path / "ALBEF.pth")
    for path, device, message in (
        (tmp_path / "gone", "cpu", "gone: no file, and no folder"),
        (tmp_path / "ALBEF.pth", "cpu", r"ALBEF\.pth: a file without its config; .*export\.py"),
        (exported, "tpu9", "device: tpu9 is not one of auto, cpu, cuda"),
        (exported, "cuda:77", "device: cuda:77, but this machine has"),
    ):
        with pytest.raises(UserError, match=message) as error:
            simla_ray.load(path, device=device)
        assert "\n" not in str(error.value)


def test_importing_is_cheap_and_loading_needs_no_ray(exported):
    code = (
        "import sys, simla_ray; assert not {'torch', 'ray', 'timm'} & set(sys.modules); "
        f"m = simla_ray.load({str(exported)!r}); print(tuple(m.encode_text(['a red circle']).shape)); "
        "assert 'ray' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 64)\n"


def test_answers_are_those_of_the_evaluation(tmp_path, vocabulary, world_rows):
    """A run fine-tuned for questions; others say that they were not."""
    known = Vocabulary(vocabulary.tokenizer, vocabulary.frequency, ["red", "blue", "two"])
    off = {f"objectives__{name}": None for name in ("itc", "itm", "mlm", "mim", "psl")}
    alone = {"schedule__kind": "joint", "schedule__phases": [], "eval__best": "last", "teacher": None, "queue": 0}
    folder, _ = make_run_folder(tmp_path / "asked", known, **off, **alone, objectives__answers={})
    model = simla_ray.load(folder, "cpu")
    images = [row["image"] for row in world_rows["val"][:3]]
    questions = ["what color is it", "how many", "what color is it"]
    found = model.answer(images, questions, top_k=9)
    assert [len(one) for one in found] == [3, 3, 3]
    assert {answer for answer, _ in found[0]} == {"red", "blue", "two"}
    for one in found:
        assert sum(p for _, p in one) == pytest.approx(1, abs=1e-5)
        assert [p for _, p in one] == sorted((p for _, p in one), reverse=True)
    (alone_found,) = model.answer(images[1], questions[1], top_k=1)
    assert alone_found[0][0] == found[1][0][0]
    with pytest.raises(UserError, match="1 pictures and 3 texts"):
        model.answer(images[:1], questions)


def test_a_run_that_was_not_taught_answers_says_so(run_folder):
    with pytest.raises(UserError, match="not fine-tuned to answer questions"):
        simla_ray.load(run_folder, "cpu").answer("x.jpg", "what")
