"""Flickr30k Entities: the rows that come of its folders, and what is dropped on the way."""

from tests.data.adapt.files import adapt, bounds, dropped, entity_files, read


def test_flickr30k_entities(tmp_path, images):
    folder = tmp_path / "entities"
    entity_files(
        folder, 1001,
        ["[/EN#5/people Two young men] look at [/EN#6/other/vehicles a bike] in [/EN#8/scene the park] .",
         "[/EN#5/people Men] with [/EN#0/notvisual it] ."],
        [("5", bounds(1, 1, 50, 100)), ("5", bounds(101, 1, 200, 100)), ("6", bounds(21, 51, 120, 140)),
         ("8", "<scene>1</scene><nobndbox>0</nobndbox>")],
    )  # fmt: skip
    entity_files(folder, 1002, ["A cat .", "A [/EN#7/animals cat"], [("7", bounds(1, 1, 2, 2))])
    bomb = '<!DOCTYPE a [<!ENTITY x "aaaa"><!ENTITY y "&x;&x;">]>'
    entity_files(folder, 1003, ["A [/EN#7/animals dog] ."], [("7", bounds(1, 1, 2, 2))], before=bomb)
    (folder / "val.txt").write_text("1001\n1003\n")
    # Half the size that the boxes were drawn at.
    assert adapt("flickr30k-entities", [folder], images("1001.jpg", "1002.jpg", "1003.jpg"), tmp_path / "out") == 0
    rows = read(tmp_path / "out")
    assert rows["1001"]["captions"] == ["Two young men look at a bike in the park .", "Men with it ."]
    men = [[0.0, 0.0, 0.25, 1.0], [0.5, 0.0, 1.0, 1.0]]
    assert rows["1001"]["phrases"] == [
        {"text": "Two young men", "boxes": men},
        {"text": "a bike", "boxes": [[0.1, 0.5, 0.6, 1.0]]},
        {"text": "Men", "boxes": men},
    ]
    assert rows["1002"]["captions"] == ["A cat ."] and not rows["1002"]["phrases"]
    assert rows["1003"]["captions"] == ["A dog ."] and "boxes" not in rows["1001"]
    assert dropped(tmp_path / "out") == {
        ("1001#0 the park", "phrase_without_box"), ("1001#1 it", "phrase_without_box"),
        ("1002#1", "markup_unreadable"), ("1003", "xml_unreadable"),
    }  # fmt: skip
    assert adapt("flickr30k-entities", [folder], images("1001.jpg"), tmp_path / "val", "--split", "val") == 0
    assert {uid: row["split"] for uid, row in read(tmp_path / "val").items()} == {"1001": "val", "1003": "val"}


def test_an_entity_bomb_is_not_expanded(tmp_path, images):
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    bomb = f'<!DOCTYPE annotation [<!ENTITY e0 "x">{levels}]><annotation>&e11;</annotation>'
    entity_files(tmp_path / "e", 1, ["A [/EN#7/animals dog] ."], [])
    for content in (bomb.encode(), f'<?xml version="1.0" encoding="UTF-16"?>{bomb}'.encode("utf-16")):
        (tmp_path / "e" / "Annotations" / "1.xml").write_bytes(content)
        out = tmp_path / f"out{len(content)}"
        assert adapt("flickr30k-entities", [tmp_path / "e"], images("1.jpg"), out) == 0
        assert dropped(out) == {("1", "xml_unreadable")}
