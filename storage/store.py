"""The index store: a folder of Parquet parts and of manifests that make them count.

Parts are written first, under a prefix of their own attempt; creating the manifest commits them. Readers follow
manifests only, so an interrupted build is invisible and a second builder of the same document loses nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import secrets
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from rabatch.errors import DocumentError, IntegrityError, StoreError
from rabatch.storage.cache import PartCache
from rabatch.storage.failures import MissingFileError
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import FORMAT_VERSION, Manifest, Part, document_key, manifest_path
from rabatch.storage.marker import check_marker, create_marker
from rabatch.storage.reading import Check, PartReader
from rabatch.storage.rules import MAX_MANIFEST_BYTES

if TYPE_CHECKING:
    from rabatch.storage.parts import LayerBlock, TokensBlock

OnError = Callable[[str, StoreError], None]
MARKER = "rabatch-store.json"
WITHDRAWN = "withdrawn"
_MANIFEST_READERS = 16  # a manifest is one round trip; their latency adds up


class IndexStore:
    """The indexes at a URL.

    Args:
        url: Local path or fsspec URL.
        create: Make the store if there is none.
        storage_options: Passed to fsspec (endpoint, credentials).
        cache: Folder of this machine that keeps parts of a store elsewhere; None: no cache. Not used for a local store.
        cache_bytes: Of all parts in it together. None: a quarter of what its disk has free; 0: no cache.

    Raises:
        StoreError: No store there, or the place cannot be read or written.
        ConfigError: `cache` is no folder of this machine, or `cache_bytes` no number of bytes.
        FormatVersionError: A store of another format.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        create: bool = False,
        storage_options: dict[str, Any] | None = None,
        cache: str | Path | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.url = str(url)
        self.folder = Folder(self.url, **(storage_options or {}))
        parts = None if cache is None or self.folder.is_local else PartCache(cache, cache_bytes)
        self._parts = PartReader(self.folder, parts)
        if create:
            create_marker(self.folder, MARKER, "rabatch", FORMAT_VERSION)
        missing = "is no rabatch store; build one there first (rabatch build), or correct the path"
        check_marker(self.folder, MARKER, "rabatch", FORMAT_VERSION, field="store", missing=missing)

    def __repr__(self) -> str:
        return f"IndexStore({self.url!r})"

    def new_attempt(self) -> str:
        """A name under which one attempt at building a document writes."""
        return uuid.uuid4().hex

    def put_layer(self, block: LayerBlock, *, document_id: str, fingerprint: str, attempt: str) -> Part:
        """Write a block; visible only once a manifest lists the part."""
        from rabatch.storage.parts import encode_layer

        key = document_key(document_id)
        data = encode_layer(block, fingerprint=fingerprint, document_key=key)
        stem = f"layer-{block.layer:03d}-heads-{block.head_start:03d}-{block.head_stop:03d}"
        path = _part_path(fingerprint, key, attempt, stem)
        return Part(
            kind="layer",
            rows=block.rows,
            layer=block.layer,
            head_start=block.head_start,
            head_stop=block.head_stop,
            key_codec=block.codecs[0],
            value_codec=block.codecs[1],
            **self._put(path, data),
        )

    def put_tokens(self, tokens: TokensBlock, *, document_id: str, fingerprint: str, attempt: str) -> Part:
        """Write a document's tokens; visible only once a manifest lists the part."""
        from rabatch.storage.parts import encode_tokens

        key = document_key(document_id)
        data = encode_tokens(tokens, fingerprint=fingerprint, document_key=key)
        path = _part_path(fingerprint, key, attempt, "tokens")
        return Part(kind="tokens", rows=len(tokens.positions), **self._put(path, data))

    def commit(self, manifest: Manifest) -> Manifest:
        """Make a document's index visible.

        Returns:
            The manifest that counts: the given one, or the one of a builder who was faster.

        Raises:
            IntegrityError: The manifest breaks a rule of the format or lists a part that is not there.
            DocumentError: The document's metadata is too large for a manifest, or not JSON.
        """
        manifest.check()
        self.check_parts(manifest)
        text = manifest.to_json().encode()
        if len(text) > MAX_MANIFEST_BYTES:  # nobody would read it
            fix = f"makes a manifest of more than {MAX_MANIFEST_BYTES} bytes; leave columns of the document out"
            raise DocumentError("metadata", manifest.metadata, fix)
        if self.folder.create(manifest.path, text):
            return manifest
        theirs = self.get(manifest.document_id, manifest.content_sha256, manifest.fingerprint)
        if theirs is None:
            raise StoreError("manifest", manifest.path, "was deleted while it was being committed; build again")
        return theirs

    def check_parts(self, manifest: Manifest) -> None:
        """Raise IntegrityError unless every part is there with its size; reads listings, no parts."""
        folders = {part.path.rsplit("/", 1)[0] for part in manifest.parts}
        there: dict[str, int] = {}
        for folder in sorted(folders):
            there |= self.folder.list(folder)
        for part in manifest.parts:
            if there.get(part.path) != part.bytes:
                fix = f"must be there with {part.bytes} bytes before its manifest; build the document again"
                raise IntegrityError(f"{manifest.path}: {part.path}", there.get(part.path), fix)

    def withdraw(self, path: str) -> None:
        """Take a committed index back, so that a build can make it anew; its parts become garbage.

        A copy of the manifest is left below ``withdrawn/``, whose age tells `rabatch.storage.garbage` since when: a
        reader may have opened the index a moment ago.

        Args:
            path: Of the manifest, as `Manifest.path` or `Problem.manifest_path` has it.

        Raises:
            StoreError: It is not the path of a manifest.
        """
        if not path.startswith("manifests/"):
            raise StoreError("path", path, "is not a manifest; withdraw takes paths that begin with manifests/")
        try:
            text = self.folder.read(path)
        except MissingFileError:
            return
        stem = path.removeprefix("manifests/").removesuffix(".json")
        self.folder.write(f"{WITHDRAWN}/{stem}-{secrets.token_hex(4)}.json", text)  # first: never gone without it
        self.folder.delete(path)

    def manifests(self, *, on_error: OnError | None = None) -> Iterator[Manifest]:
        """Every committed index, by path.

        Args:
            on_error: Called with the path and the error of a damaged manifest, which is then left out. By default
                the error is raised.
        """
        return self.read_manifests((file.path for file in self.folder.walk("manifests")), on_error=on_error)

    def find(
        self, document_id: str, *, fingerprint: str | None = None, on_error: OnError | None = None
    ) -> list[Manifest]:
        """The committed indexes of a document: of all its contents, and fingerprints unless one is given.

        Takes a request for each fingerprint of the store and one for each index found. `on_error` as of `manifests`.
        """
        folder = self.folder
        folders = folder.subfolders("manifests") if fingerprint is None else [f"manifests/{fingerprint[:16]}"]
        start = document_key(document_id) + "-"
        if folder.is_local:  # where threads would wait for each other, once for every name in a folder
            listed = [folder.files(path, start) for path in folders]
        else:
            with ThreadPoolExecutor(_MANIFEST_READERS) as pool:
                listed = list(pool.map(lambda path: folder.files(path, start), folders))
        paths = [file.path for files in listed for file in files]
        found = self.read_manifests(paths, on_error=on_error)
        return [m for m in found if m.document_id == document_id and fingerprint in (None, m.fingerprint)]

    def get(self, document_id: str, content_sha256: str, fingerprint: str) -> Manifest | None:
        """The index of exactly this document, content and fingerprint, without a listing; None if there is none."""
        path = manifest_path(document_id, content_sha256, fingerprint)
        try:
            manifest = self._load(path)
        except MissingFileError:
            return None
        wanted = {"content_sha256": content_sha256, "fingerprint": fingerprint}
        for where, mine in wanted.items():
            theirs = getattr(manifest, where)
            if mine != theirs:  # the path holds 64 bits of each
                raise IntegrityError(f"{path}: {where}", theirs, f"must be {mine}; use another store for one of them")
        return manifest

    def read_manifests(self, paths: Iterable[str], *, on_error: OnError | None = None) -> Iterator[Manifest]:
        """The manifests at these paths, in their order; one that was withdrawn meanwhile is left out.

        `on_error` as of `manifests`.
        """

        def load(path: str) -> Manifest | StoreError | None:
            try:
                return self._load(path)
            except MissingFileError:
                return None
            except StoreError as error:
                return error

        with ThreadPoolExecutor(_MANIFEST_READERS) as pool:
            rest = iter(paths)
            while batch := list(itertools.islice(rest, 4 * _MANIFEST_READERS)):  # not all at once: there may be many
                for path, result in zip(batch, pool.map(load, batch), strict=True):
                    if isinstance(result, Manifest):
                        yield result
                    elif result is not None and on_error is None:
                        raise result
                    elif result is not None and on_error is not None:
                        on_error(path, result)

    def read_layer(
        self, manifest: Manifest, layer: int, *, heads: range | None = None, check: Check = True
    ) -> LayerBlock:
        """Keys, values and graph of a layer, joined over its parts.

        Args:
            heads: Consecutive KV heads that all stream or all do not; all by default. See `read_heads`.
            check: Compare each part's SHA-256 with the manifest's, of the bytes in the store itself. Without it a
                changed byte may pass unnoticed, but only the bytes of the wanted heads are read. ``"once"``: through
                the cache; or, on a local disk, unless this store has read the part before, found it right, and the
                file was not written to or replaced since, as far as its times tell.

        Raises:
            IntegrityError: A part is missing, changed, or belongs elsewhere.
            StoreError: There is no such layer or head, or some of the heads stream and some do not.
        """
        n_heads = manifest.geometry.n_kv_heads
        heads = range(n_heads) if heads is None else heads
        if not 0 <= layer < manifest.geometry.n_layers:
            raise StoreError("layer", layer, f"must be in [0, {manifest.geometry.n_layers})")
        if len(heads) == 0 or heads.step != 1 or heads.start < 0 or heads.stop > n_heads:
            raise StoreError("heads", heads, f"must be a non-empty range within {n_heads} KV heads")
        streaming = manifest.geometry.streaming_among(layer, heads)
        if streaming not in (0, len(heads)):
            raise StoreError("heads", heads, f"only {streaming} of these heads of layer {layer} stream; use read_heads")
        return self._joined(manifest, layer, heads, check)

    def read_heads(self, manifest: Manifest, layer: int, *, streaming: bool, check: Check = True) -> LayerBlock | None:
        """All streaming heads of a layer, which hold the static set only, or all others; None if there are none.

        They are numbered by their place in `Geometry.heads`. `check` and errors as of `read_layer`.
        """
        heads = manifest.geometry.heads(layer, streaming=streaming)
        return self._joined(manifest, layer, heads, check) if heads else None

    def _joined(self, manifest: Manifest, layer: int, heads: Sequence[int], check: Check) -> LayerBlock:
        from rabatch.storage.joining import join

        parts = [p for p in manifest.parts if p.kind == "layer" and p.layer == layer and p.head_start <= heads[-1]]
        blocks = []
        for part in sorted(parts, key=lambda p: p.head_start):
            wanted = [
                head for head in heads if part.head_start <= head < part.head_stop
            ]  # in a part they are of a kind
            if wanted:
                some = range(wanted[0], wanted[-1] + 1)
                blocks.append(self.read_part(manifest, part, heads=some, check=check))
        return blocks[0] if len(blocks) == 1 else join(manifest, blocks)

    def read_part(
        self, manifest: Manifest, part: Part, *, heads: range | None = None, check: Check = True
    ) -> LayerBlock:
        """One layer part, checked against its manifest. Arguments and errors as of `read_layer`."""
        from rabatch.storage.joining import check_against
        from rabatch.storage.parts import decode_layer

        expect: dict[str, object] = {"layer": part.layer, "head_start": part.head_start, "head_stop": part.head_stop}
        expect |= _expect(manifest)
        groups = None if heads is None else range(heads.start - part.head_start, heads.stop - part.head_start)
        block = self._parts.read(
            part, check, lambda data: decode_layer(data, name=part.path, expect=expect, heads=heads), groups=groups
        )
        check_against(manifest, part, block)
        return block

    def read_tokens(self, manifest: Manifest, *, check: Check = True) -> TokensBlock:
        """The context's tokens. `check` and errors as of `read_layer`."""
        from rabatch.storage.parts import decode_tokens

        part = next(part for part in manifest.parts if part.kind == "tokens")
        expect, rows = _expect(manifest), part.rows
        tokens = self._parts.read(
            part, check, lambda data: decode_tokens(data, name=part.path, expect=expect, rows=rows)
        )
        if not np.array_equal(tokens.positions, np.arange(manifest.context_tokens)):
            shown = len(tokens.positions)
            raise IntegrityError(f"{part.path}: position", shown, f"must be 0 to {manifest.context_tokens - 1}")
        return tokens

    def _put(self, path: str, data: pa.Buffer) -> dict[str, Any]:
        view = memoryview(data)
        self.folder.write(path, view)
        return {"path": path, "bytes": view.nbytes, "sha256": hashlib.sha256(view).hexdigest()}

    def _load(self, path: str) -> Manifest:
        manifest = Manifest.from_json(self.folder.read(path, max_bytes=MAX_MANIFEST_BYTES), name=path)
        if manifest.path != path:
            raise IntegrityError(f"{path}: document_id", manifest.document_id, f"belongs at {manifest.path}")
        return manifest


def _part_path(fingerprint: str, key: str, attempt: str, stem: str) -> str:
    # A replayed task must never overwrite a file that a manifest may list.
    return f"parts/{fingerprint[:16]}/{key}/{attempt}/{stem}-{secrets.token_hex(4)}.parquet"


def _expect(manifest: Manifest) -> dict[str, object]:
    return {"fingerprint": manifest.fingerprint, "document_key": document_key(manifest.document_id)}
