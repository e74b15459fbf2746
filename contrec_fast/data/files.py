"""Whole files in, whole folders out, and the words for what is wrong with them."""

import os
import shutil
import uuid
from contextlib import contextmanager
from pathlib import Path

UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def read_bytes(path: Path) -> bytes:
    """The content of a file; ValueError, in one line, where there is none to read."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a file, got nothing") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a readable file, got: {error.strerror}") from None


def decode(path: Path, data: bytes) -> str:
    """UTF-8, with or without a byte-order mark, as text; ValueError names the line of the rest."""
    if data.startswith(UTF16_MARKS):
        raise ValueError(f"{path}: expected UTF-8, got UTF-16 (by its byte-order mark)")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8, got byte 0x{data[error.start]:02x} "
            f"at offset {error.start}"
        ) from None


def require_free(folder: Path) -> None:
    """ValueError unless the folder is new or empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that exists")


@contextmanager
def whole_folder(folder: Path):
    """A folder to fill; it appears as `folder`, new or empty, with everything or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def whole_file(path: Path):
    """A name to write to; the file appears at `path`, whole, or what was there stays."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(folder: Path, contents: dict[str, bytes]) -> None:
    """Write the files of a new or empty folder, which appears with all of them or not at all."""
    with whole_folder(folder) as temporary:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)


def shorten(text: str, limit: int = 40) -> str:
    """What came, quoted, in one line of readable length."""
    return repr(text if len(text) <= limit else text[:limit] + "...")
