"""HTML elements as nested calls. Captions and names come from strangers: text is escaped unless it is ``Markup``."""

from __future__ import annotations

import base64
import binascii
import html
import io
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image

#: Formats that are embedded as they are; a browser can show all of them.
PICTURE_TYPES = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp", "GIF": "image/gif"}
#: Pictures below this many pixels are enlarged in blocks: smoothing would blur what the model was given.
SMALL_PX = 96
VOID = ("img", "meta")


class Markup(str):
    """Text that is HTML already."""


def tag(element: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element. ``class_`` gives the attribute class, ``a_b`` a-b; None children and attributes are left out."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if element in VOID:
        return Markup(f"<{element}{pairs}>")
    return Markup(f"<{element}{pairs}>{join(children)}</{element}>")


def join(parts: Iterable[Any], between: str = "") -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    return Markup(between.join(_safe(part) for part in parts if part is not None))


def _safe(part: Any) -> str:
    return str(part) if isinstance(part, Markup) else html.escape(str(part))


def table(
    head: Sequence[Any],
    rows: Iterable[Sequence[Any]],
    title: str,
    numbers: Sequence[int] = (),
    class_: str | None = None,
    shown: bool = True,
) -> Markup:
    """A table that scrolls inside its own container; columns in ``numbers`` are set to the right.

    The title stands outside, so that it does not scroll away; with ``shown=False`` only screen readers have it.
    """

    def line(element: str, row: Sequence[Any], **attributes: str) -> Markup:
        kinds = ["number" if i in numbers else None for i in range(len(row))]
        return tag("tr", *(tag(element, cell, class_=k, **attributes) for cell, k in zip(row, kinds, strict=True)))

    body = tag("tbody", *(line("td", row) for row in rows))
    inner = tag("table", tag("thead", line("th", head, scope="col")), body, class_=class_)
    # A region that scrolls must be reachable by keyboard.
    scrolling = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=title)
    return join([tag("p", title, class_="title") if shown else None, scrolling])


def picture(encoded: Any, alt: str, class_: str = "") -> Markup | None:
    """An embedded picture from base64; None if there is none or it is not one that browsers show."""
    raw = decode_picture(encoded)
    if raw is None:
        return None
    kind, width, height = _look(raw)
    small = "blocks" if max(width, height) < SMALL_PX else ""
    return tag("img", src=data_uri(raw, PICTURE_TYPES[kind]), alt=alt, width=width, height=height,
               class_=f"{class_} {small}".strip() or None, loading="lazy", decoding="async")  # fmt: skip


def decode_picture(encoded: Any) -> bytes | None:
    """The bytes of a base64 picture, or None."""
    if not isinstance(encoded, str) or not encoded:
        return None
    try:
        raw = base64.b64decode(encoded, validate=True)
        return raw if _look(raw)[0] in PICTURE_TYPES else None
    except (binascii.Error, ValueError, OSError, SyntaxError):
        return None


def data_uri(raw: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(raw).decode()}"


def _look(raw: bytes) -> tuple[str, int, int]:
    with Image.open(io.BytesIO(raw), formats=list(PICTURE_TYPES)) as image:
        return str(image.format), image.width, image.height
