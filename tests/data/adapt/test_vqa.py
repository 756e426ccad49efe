"""VQAv2: the rows that come of its files, and what is dropped on the way."""

import re

import pyarrow.parquet as pq

from tests.data.adapt.files import adapt, dropped, manifest, picture, read, vqa_files


def test_vqav2(tmp_path, images, capsys):
    folder, files = (
        images("val2014/COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"),
        vqa_files(tmp_path),
    )
    assert adapt("vqav2", files, folder, tmp_path / "out") == 0
    (row,) = read(tmp_path / "out").values()
    assert (row["uid"], row["image_id"], row["split"]) == ("COCO_val2014_000000000042", "42", "val")
    assert row["qas"] == [
        {"question": "What color is the ball?", "answers": ["red"] * 8 + ["dark red", "pink"], "type": "other"},
        {"question": "Is it round?", "answers": ["yes"] * 9, "type": "yes/no"},
    ]
    assert row["captions"] == ["What color is the ball?", "Is it round?"] and row["image"] == picture(0)
    assert "captions" not in pq.read_schema(tmp_path / "out" / "data-00000.parquet").names
    assert dropped(tmp_path / "out") == {
        ("42001", "answer_empty"), ("42002", "question_empty"), ("73000", "answers_empty"), ("73000", "answer_empty"),
        ("COCO_val2014_000000000074", "image_missing"),
    }  # fmt: skip
    found = manifest(tmp_path / "out")
    assert (found["rows"], found["rows_in"], found["entries"]) == (1, 2, {"qas": 2})
    assert found["dropped"] == {"answer_empty": 11, "question_empty": 1, "answers_empty": 1, "image_missing": 1}
    assert re.search(r"^rows +1 of 2$", capsys.readouterr().out, re.MULTILINE)


def test_vqav2_without_answers(tmp_path, images, capsys):
    questions, annotations = vqa_files(tmp_path)
    folder = images("COCO_val2014_000000000042.jpg")
    assert adapt("vqav2", [questions], folder, tmp_path / "out") == 2
    assert "none of its 5 questions has annotations; give their file too (the answers of a test split" in (
        capsys.readouterr().err
    )
    assert adapt("vqav2", [annotations], folder, tmp_path / "out") == 2
    assert "no file with questions" in capsys.readouterr().err
    assert adapt("vqav2", [questions, annotations], folder, tmp_path / "out", "--split", "train") == 2
    assert "--split: train is not in" in (error := capsys.readouterr().err) and error.endswith("; found val\n")
    assert not (tmp_path / "out").exists()
