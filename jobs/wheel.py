"""The code that runs here as a wheel, for workers elsewhere.

Written from the files themselves, so it takes no build tool and is the same for the same code, whether that is a
checkout or installed. It names no dependencies: Ray installs it with pip on every node, which would fetch torch again.
The nodes' image has to bring them.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import rabatch
from rabatch.jobs.cluster import checkout_root

_FOLDERS = {"rabatch": "rabatch", "index": "rabatch/index", "storage": "rabatch/storage", "jobs": "rabatch/jobs"}
_SUFFIXES = (".py", ".typed")
_DATA = ("rabatch/demo/model/", "rabatch/demo/head_pattern/")
_DIGITS = 16
_WHEEL = "Wheel-Version: 1.0\nGenerator: rabatch\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
_FIRST_DATE = (1980, 1, 1, 0, 0, 0)  # of a zip file


def code_files() -> dict[str, bytes]:
    """Content of every file of the package, by its path in an installed one, sorted."""
    root = checkout_root()
    if root is None:
        found = _below(Path(rabatch.__file__).resolve().parent, "rabatch")
    else:
        found = (file for folder, place in _FOLDERS.items() for file in _below(root / folder, place))
    return {name: path.read_bytes() for name, path in sorted(found)}


def code_digest(files: dict[str, bytes]) -> str:
    """SHA-256, in hex, over paths and contents."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{hashlib.sha256(data).hexdigest()}\n".encode())
    return digest.hexdigest()


def write_wheel(folder: Path, files: dict[str, bytes]) -> Path:
    """A wheel of `files` in `folder`; its path.

    The name holds the digest of the code, as its build tag: Ray knows a wheel by its name, and does not send one again.
    """
    version = rabatch.__version__
    info = f"rabatch-{version}.dist-info"
    about = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: rabatch\nVersion: {version}\n",
        f"{info}/WHEEL": _WHEEL,
    }
    every = {**files, **{name: text.encode() for name, text in about.items()}}
    record = "".join(f"{name},sha256={_urlsafe(data)},{len(data)}\n" for name, data in every.items())
    every[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = folder / f"rabatch-{version}-0{code_digest(files)[:_DIGITS]}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in every.items():
            entry = zipfile.ZipInfo(name, _FIRST_DATE)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return path


def _below(folder: Path, place: str) -> Iterator[tuple[str, Path]]:
    for path in folder.rglob("*"):
        name = f"{place}/{path.relative_to(folder).as_posix()}"
        if path.is_file() and (path.suffix in _SUFFIXES or name.startswith(_DATA)) and "__pycache__" not in name:
            yield name, path


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
