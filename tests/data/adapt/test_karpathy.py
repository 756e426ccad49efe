"""The splits of Karpathy: the rows that come of a file, and what is dropped on the way."""

from tests.data.adapt.files import adapt, dropped, read, write_json


def test_karpathy(tmp_path, images):
    def entry(number, split, *texts, **more):
        sentences = [{"tokens": t.split(), "raw": t, "imgid": number, "sentid": i} for i, t in enumerate(texts)]
        return {
            "sentids": [0],
            "imgid": number,
            "sentences": sentences,
            "split": split,
            "filename": f"{number}.jpg",
            **more,
        }

    coco = {"filepath": "val2014", "cocoid": 5}
    entries = [entry(0, "restval", "A dog .", "", **coco), entry(1, "val", "A cat .", **coco), entry(2, "train", "A .")]
    file = write_json(tmp_path / "dataset_coco.json", {"images": entries, "dataset": "coco"})
    folder = images("val2014/0.jpg", "val2014/1.jpg", "2.jpg")
    assert adapt("karpathy", [file], folder, tmp_path / "a") == 0
    rows = read(tmp_path / "a")
    assert {uid: row["split"] for uid, row in rows.items()} == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "train"}
    assert rows["0.jpg"]["captions"] == ["A dog ."] and dropped(tmp_path / "a") == {("0.jpg#1", "caption_empty")}
    assert adapt("karpathy", [file], folder, tmp_path / "b", "--restval", "keep", "--split", "restval") == 0
    assert list(read(tmp_path / "b")) == ["0.jpg"]
    assert adapt("karpathy", [file], folder, tmp_path / "c", "--split", "train") == 0
    assert list(read(tmp_path / "c")) == ["0.jpg", "2.jpg"]
