"""The marker: a small JSON file that says what a folder holds and in which format."""

from __future__ import annotations

import json

from rabatch.errors import FormatVersionError, IntegrityError, StoreError
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.rules import MAX_MANIFEST_BYTES


def create_marker(folder: Folder, path: str, kind: str, version: int) -> None:
    """Mark `folder` as one of `kind`, if it is not yet.

    Raises:
        StoreError: It cannot be written, or the server ignores the condition of the put, on which commits rest.
    """
    text = json.dumps({"format": kind, "format_version": version})
    if not folder.create(path, f"{text}\n".encode()):
        return
    # A server that ignores the condition of the put would let two jobs overwrite each other. Ask it now.
    if folder.create(path, f"{text} \n".encode()):
        fix = "the server ignores If-None-Match, so commits would not be safe; use S3 or a server that honours it"
        raise StoreError("store", folder.url, fix)


def check_marker(folder: Folder, path: str, kind: str, version: int, *, field: str, missing: str) -> None:
    """Raise unless `folder` is marked as one of `kind`, in the format `version`.

    Args:
        field: What messages call the folder.
        missing: What is said where there is no marker.

    Raises:
        StoreError: There is no marker.
        IntegrityError: The marker is another's.
        FormatVersionError: Another format.
    """
    try:
        text = folder.read(path, max_bytes=MAX_MANIFEST_BYTES)
    except MissingFileError as error:
        raise StoreError(field, folder.url, missing) from error
    try:
        values = json.loads(text)
        known = values["format"] == kind
    except (ValueError, TypeError, KeyError, RecursionError):
        known, values = False, {}
    if not known:
        raise IntegrityError(f"{folder.url}/{path}", text[:60], f"is not a marker of the format {kind}")
    found = values.get("format_version")
    if type(found) is not int or found != version:
        fix = f"this rabatch reads format {version}; use the version that wrote it, or build again"
        raise FormatVersionError(f"{folder.url}: format_version", found, fix)
