"""What only a server can get wrong."""

from typing import Any

import pytest
from storage_samples import prepare

from rabatch.errors import StoreError
from rabatch.storage.filesystem import Folder
from rabatch.storage.store import IndexStore


def test_a_missing_bucket_is_named(s3_options: dict[str, Any]) -> None:
    for create in (False, True):
        with pytest.raises(StoreError, match=r"s3://no-such-bucket.*the bucket does not exist; create it") as caught:
            IndexStore("s3://no-such-bucket/store", create=create, storage_options=s3_options)
        assert "\n" not in str(caught.value)


def test_a_folder_without_a_store_is_named(s3_url: tuple[str, dict[str, Any]]) -> None:
    with pytest.raises(StoreError, match="is no rabatch store"):
        IndexStore(s3_url[0], storage_options=s3_url[1])


def test_missing_credentials_are_named(s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(StoreError, match=r"no credentials found|access denied"):
        Folder("s3://bucket/x", endpoint_url=s3_options["endpoint_url"], anon=False).write("a", b"1")


def test_a_server_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    monkeypatch.setattr(S3FileSystem, "retries", 1)
    monkeypatch.setattr("rabatch.storage.filesystem._FIRST_WAIT_S", 0.001)
    config = {"connect_timeout": 1, "retries": {"max_attempts": 0}}
    folder = Folder("s3://bucket/x", key="a", secret="b", endpoint_url="http://127.0.0.1:9", config_kwargs=config)
    with pytest.raises(StoreError, match="the server does not answer; check the endpoint"):
        folder.read("a")


def test_listings_are_never_stale(s3_url: tuple[str, dict[str, Any]]) -> None:
    url, options = s3_url
    reader, writer = (IndexStore(url, create=True, storage_options=options) for _ in range(2))
    for i in range(3):
        assert len(list(reader.manifests())) == i
        writer.commit(prepare(writer, f"doc {i}")[0])


def test_a_large_part_goes_up_and_down_whole(s3_url: tuple[str, dict[str, Any]]) -> None:
    folder = Folder(s3_url[0], **s3_url[1])
    data = bytes(range(256)) * (8 << 12) + b"odd"
    folder.write("large.bin", memoryview(data))
    assert folder.size("large.bin") == len(data)
    assert folder.read("large.bin") == data


def test_our_reading_of_a_listing_is_that_of_the_client(s3_url: tuple[str, dict[str, Any]]) -> None:
    import s3fs

    folder = Folder(s3_url[0], **s3_url[1])
    names = ["a&b <c> é%2B+\"'.bin", "plain", "tab\tand\u2028line", "x/文書"]
    for i, name in enumerate(names):
        folder.write(name, bytes(i))
    plain = s3fs.S3FileSystem(**s3_url[1], skip_instance_cache=True)
    theirs = plain.find(s3_url[0].removeprefix("s3://"), detail=True)
    ours = {file.path: file for file in folder.files()}
    start = len(s3_url[0].removeprefix("s3://")) + 1
    assert {name[start:]: info["size"] for name, info in theirs.items()} == {name: i for i, name in enumerate(names)}
    assert {name[start:]: (info["size"], info["LastModified"].timestamp()) for name, info in theirs.items()} == {
        path: (file.bytes, file.changed_s) for path, file in ours.items()
    }
    assert all(ours[name[start:]].tag == f"{info['size']}-{info['ETag']}" for name, info in theirs.items())


def test_long_listings_come_whole(s3_url: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(s3_url[0], **s3_url[1])
    names = [f"{i:02x}" for i in range(13, 20)]
    for name in names:
        folder.write(f"many/{name}", b"")
    monkeypatch.setattr(folder._fs, "req_kw", {"MaxKeys": 2})  # four pages
    assert [file.path for file in folder.files("many")] == [f"many/{name}" for name in names]
    assert [file.path for file in folder.files("many", "1")] == [f"many/{name}" for name in names if name[0] == "1"]
