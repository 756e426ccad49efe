"""Which files a URI stands for, and their formats: named before it (``parquet:URI``), or told by their endings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePath

from simla_ray.data.sources import files
from simla_ray.data.sources.listed import is_image_folder
from simla_ray.data.sources.unit import DataFile
from simla_ray.errors import UserError

#: Formats that are read as they stream in, and those that are lists, whose images are files beside them.
STREAMED = ("parquet", "tar")
LISTS = ("json", "coco", "csv", "tsv", "folder")
ENDINGS = {f".{name}": name for name in ("parquet", "tar", "json", "csv", "tsv")}
#: What a converted data set says of itself; in a folder it is no list of images.
MANIFEST = "manifest.json"
KNOWN = ", ".join(ENDINGS)


def list_files(uri: str, key: str) -> list[DataFile]:
    """Files behind a path, folder or glob, in order; a folder of images with their captions is one of them.

    A folder or glob whose format is named holds nothing else, but for files whose names begin with a dot or a low line.

    Raises:
        UserError: naming the key and the URI that gives no file, or a format that is not read.
    """
    format, where = files.named(uri)
    if format is not None and format not in (*STREAMED, *LISTS):
        raise UserError(
            f"{key}: {uri}: {format} is no format; allowed: {', '.join((*STREAMED, *LISTS))} "
            f"(a path with a colon in its first name is given as ./{uri})"
        )
    in_store = files.is_remote(where)
    found = _named(where, format) if format else [_recognised(file, key, in_store) for file in _by_ending(where)]
    if not found:
        what = f"file of {KNOWN}, and no images{_hint(uri)}" if format is None else "such file"
        raise UserError(f"{key}: {uri} does not exist or holds no {what}")
    for file in found:
        if in_store and file.format in LISTS:
            raise UserError(
                f"{key}: {file.path} is a list, whose images are files; "
                f"from a store only {' and '.join(STREAMED)} are read"
            )
    return found


def _recognised(file: str, key: str, in_store: bool) -> DataFile:
    if not in_store and Path(file).is_dir():
        return DataFile(file, "folder")
    format = ENDINGS.get(files.pure(file).suffix)
    if format is None:
        raise UserError(f"{key}: {file} is none of {KNOWN}, or a folder of images{_hint(file)}")
    return DataFile(file, format)


def _hint(uri: str) -> str:
    return f"; files of other names are read with their format named, as in parquet:{uri}"


def _by_ending(uri: str) -> Sequence[str]:
    """Data files by their endings, and the folders of images."""
    if files.is_remote(uri):
        here = files.listed(uri)
        # Of a folder or a pattern the data files, whatever else lies there.
        return [file for file in here if _holds_rows(files.pure(file))] if len(here) > 1 else here
    path = Path(uri).absolute()
    return [str(p) for p in (_in_folder(path) if path.is_dir() else _on_disk(uri))]


def _named(uri: str, format: str) -> list[DataFile]:
    """Files that are all of one format."""
    if files.is_remote(uri):
        here = files.listed(uri)
        return [DataFile(file, format) for file in here if len(here) == 1 or _may_hold_rows(files.pure(file))]
    found: list[Path] = []
    for path in _on_disk(uri):
        if not path.is_dir():
            found += [path] if format != "folder" else []
        elif format == "folder":
            found.append(path)
        else:
            found += sorted(p for p in path.iterdir() if _may_hold_rows(p) and p.is_file())
    return [DataFile(str(path), format) for path in found]


def _on_disk(uri: str) -> list[Path]:
    path = Path(uri).absolute()  # workers run elsewhere
    if path.exists():
        return [path]
    if any(c in uri for c in "*?["):
        return sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return []


def _in_folder(path: Path) -> list[Path]:
    """The data files that lie in a folder, or the folder itself where they are its images' captions."""
    found = sorted(p for p in path.iterdir() if _holds_rows(p) and p.is_file())
    if all(p.suffix == ".json" for p in found) and is_image_folder(path):
        return [path]
    return found


def _holds_rows(path: PurePath) -> bool:
    return path.suffix in ENDINGS and path.name != MANIFEST


def _may_hold_rows(path: PurePath) -> bool:
    return not path.name.startswith((".", "_")) and path.name != MANIFEST
