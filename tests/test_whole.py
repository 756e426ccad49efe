"""A file is there as it was or as it is to be, never in between."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from simla_ray.whole import write_whole

WRITER = """
import sys
from pathlib import Path
from simla_ray.whole import write_whole
print("up", flush=True)
while True:
    for letter in "ab":
        write_whole(Path(sys.argv[1]), letter * 2_000_000)
"""


def test_a_file_is_replaced_and_nothing_is_left(tmp_path: Path):
    path = tmp_path / "a.json"
    for text in ("{}", "ä"):
        write_whole(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path):
    path = tmp_path / "a.txt"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"up\n"
        time.sleep(0.1)
        writer.kill()
        writer.wait()
        text = path.read_text()
        assert len(text) == 2_000_000 and len(set(text)) == 1


def test_what_was_there_stays_where_there_is_no_way_to_write(tmp_path: Path):
    path = tmp_path / "a.txt"
    write_whole(path, "before")
    (tmp_path / "b").write_text("no folder")
    with pytest.raises(OSError):
        write_whole(tmp_path / "b" / "c.txt", "after")
    with pytest.raises(TypeError):
        write_whole(path, b"after")  # type: ignore[arg-type]
    assert path.read_text() == "before"
