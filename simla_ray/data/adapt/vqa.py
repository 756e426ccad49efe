"""VQAv2: questions and annotations in COCO's style (https://visualqa.org/download.html)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simla_ray.data.adapt.gathered import Gathered, worded
from simla_ray.data.adapt.reading import read_json
from simla_ray.errors import UserError


def vqav2(files: Sequence[Path], gathered: Gathered) -> None:
    """``qas`` with the answers as annotated, ten a question; ``type`` is the annotated answer type (yes/no, number,
    other), by which the official evaluation reports.

    Raises:
        UserError: a file is neither of the two, or questions come without annotations, as a test split's do.
    """
    texts: dict[str, str] = {}

    def as_text(entry: dict[str, Any]) -> Any:
        """Of millions of annotated answers nothing is kept but their text, each text once."""
        if "answer" not in entry or "question_id" in entry:
            return entry
        answer = entry["answer"]
        return texts.setdefault(answer, answer) if isinstance(answer, str) else None

    questions: list[tuple[Path, dict[str, Any]]] = []
    annotated: dict[Any, dict[str, Any]] = {}
    for path in files:
        found = read_json(path, as_text)
        if isinstance(found, dict) and isinstance(found.get("questions"), list):
            questions.append((path, found))
        elif isinstance(found, dict) and isinstance(found.get("annotations"), list):
            for entry in found["annotations"]:
                if isinstance(entry, dict) and isinstance(entry.get("answers"), list):
                    annotated[str(entry.get("question_id"))] = entry
        else:
            raise UserError(f"{path}: expected VQAv2's object with questions, or that with annotations")
    if not questions:
        raise UserError("--annotations: no file with questions; give the questions file and the annotations file")
    for path, found in questions:
        ids = [str(entry.get("question_id")) for entry in found["questions"] if isinstance(entry, dict)]
        if ids and not annotated.keys() & set(ids):
            raise UserError(
                f"{path}: none of its {len(ids):,} questions has annotations; give their file too "
                "(the answers of a test split are not public: nothing to train or judge on)"
            )
        _gather(path, found, annotated, gathered)


def _gather(path: Path, found: dict[str, Any], annotated: dict[Any, dict[str, Any]], gathered: Gathered) -> None:
    subtype = str(found.get("data_subtype", ""))
    split = re.sub(r"\d+$", "", subtype)
    if not gathered.wants(split or gathered.split):
        return
    for entry in found["questions"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int):
            gathered.drop(entry.get("question_id") if isinstance(entry, dict) else entry, "entry_unreadable", path)
            continue
        question, answer = entry.get("question_id"), annotated.get(str(entry.get("question_id")))
        if answer is None:
            gathered.drop(question, "answers_missing", path)
            continue
        answers = [text for text in map(worded, answer["answers"]) if text]
        for _ in range(len(answer["answers"]) - len(answers)):
            gathered.drop(question, "answer_empty", path)
        text = worded(entry.get("question"))
        if not text or not answers:
            gathered.drop(question, "answers_empty" if text else "question_empty", path)
            continue
        number = f"{entry['image_id']:012d}"
        names = (f"COCO_{subtype}_{number}.jpg", f"{number}.jpg") if subtype else (f"{number}.jpg",)
        record = gathered.record(names[0].removesuffix(".jpg"), [names], split or None, image_id=str(entry["image_id"]))
        kind = answer.get("answer_type") or answer.get("question_type")
        qa = {"question": text, "answers": answers, "type": kind if isinstance(kind, str) else None}
        record.columns.setdefault("qas", []).append(qa)
