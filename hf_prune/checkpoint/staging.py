"""Write a folder so that a failure at any moment leaves the old one whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: Path, is_stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; what is written to it replaces files of `folder` when the block ends well.

    A new `folder` appears at once. In an existing one files are exchanged by renaming, and put back if one cannot be;
    files for which `is_stale(name)` and that are not written again go, all others stay. Nothing temporary is left.
    """
    folder = folder.resolve()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"folder must be a directory or not exist yet, got the file {str(folder)!r}.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        _flush(new)
        if folder.exists():
            _exchange(new, folder, old, is_stale)
        else:
            new.rename(folder)
        _flush_folder(folder)
        _flush_folder(folder.parent)
    finally:
        shutil.rmtree(work)


def _exchange(new: Path, folder: Path, old: Path, is_stale: Callable[[str], bool]) -> None:
    written = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    stale = {Path(path.name) for path in folder.iterdir() if path.is_file() and is_stale(path.name)}
    moves = [(folder / name, old / name) for name in sorted(written | stale) if (folder / name).exists()]
    moves += [(new / name, folder / name) for name in sorted(written)]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            target.rename(source)
        raise


def _flush(folder: Path) -> None:
    """Have every file below `folder` on disk before a rename makes it the only one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
