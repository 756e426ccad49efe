"""What lies beside an image in a tar or a folder: captions as text, or captions and more as JSON."""

from __future__ import annotations

import json
from typing import Any

from simla_ray.data.schema import by_our_names

#: Endings, without the dot, of images and of what describes them; JSON is looked at first.
IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
WORDS = ("json", "txt")


def described(ending: str, content: bytes, other: str | None = None) -> dict[str, Any]:
    """Columns of the row under our names, or ``{"image": reason}`` for content that is neither UTF-8 nor JSON.

    A text gives one caption a line; JSON is an object with the columns of a row, or a list of captions.
    ``other`` is one more of the object's, by its own name.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return {"image": "caption_not_utf8"}
    if ending == "txt":
        return {"captions": [line for line in text.splitlines() if line.strip()]}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {"image": "caption_unreadable"}
    if isinstance(found, list):
        found = {"captions": found}
    if not isinstance(found, dict):
        return {"image": "caption_unreadable"}
    columns = by_our_names(found) | ({other: found.get(other)} if other is not None else {})
    return {name: value for name, value in columns.items() if name not in ("image", "images")}
