"""The page of a search: nothing is fetched, nothing is run, whatever a file is called."""

import base64
import io

from PIL import Image

from simla_ray.report.search import NAMED, THUMBNAIL_PX, Found, search_page, thumbnail
from tests.report.test_page import Outline, text_of

EVIL = "<script>alert('x')</script> & \"dogs\".jpg"


def found(n):
    small = thumbnail(Image.new("RGB", (40, 30), "#123456"))
    return [Found(f"{i}.jpg", 0.5 - i / 100, 0.9 - i / 100, f"pictures/{i}.jpg", small) for i in range(n)]


def test_hits_with_scores_and_links():
    page = search_page("a red ring", "mine", "The 3 best of 40 pictures.", found(3), {})
    outline, text = Outline(page), text_of(page)
    assert outline.open == [] and outline.sections() == ["found"]
    assert "1 match 90 %, similarity 0.500" in text and "3 match 88 %, similarity 0.480" in text
    links = [a["href"] for tag, a in outline.tags if tag == "a"][1:]
    assert links == [f"pictures/{i}.jpg" for i in (0, 0, 1, 1, 2, 2)]
    pictures = [a for tag, a in outline.tags if tag == "img"]
    assert len(pictures) == 3 and all(p["src"].startswith("data:image/jpeg") and p["alt"] for p in pictures)
    assert "ITM's head" in text


def test_names_and_queries_are_escaped():
    hit = Found(EVIL, 0.1, None, None, None)
    page = search_page(EVIL, "mine", EVIL, [hit], {"image_unreadable": [EVIL]})
    assert "<script" not in page and text_of(page).count("alert('x')") == 5  # title, head, about, hit, dropped
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    assert "ITM's head" not in text_of(page) and '<a href="#dropped"' in page


def test_a_long_list_of_dropped_names_is_cut():
    page = text_of(search_page("a", "mine", "", [], {"image_truncated": [f"{i}.jpg" for i in range(NAMED + 5)]}))
    assert "image_truncated 25 0.jpg, 1.jpg" in page and "19.jpg and 5 more" in page and "20.jpg" not in page


def test_the_picture_asked_for_is_shown():
    page = search_page("dog.jpg", "mine", "", found(1), {}, asked=thumbnail(Image.new("RGB", (9, 9))))
    alts = [a["alt"] for tag, a in Outline(page).tags if tag == "img"]
    assert alts == ["the picture searched for", "0.jpg"]


def test_thumbnails_are_small():
    for size, expected in (((4000, 1000), (THUMBNAIL_PX, 80)), ((40, 30), (40, 30))):
        raw = base64.b64decode(thumbnail(Image.effect_noise(size, 80)))
        assert Image.open(io.BytesIO(raw)).size == expected and len(raw) < 60_000
