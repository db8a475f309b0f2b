"""The stored format and the store: Parquet parts and JSON manifests on a local folder or object storage.

`rabatch.storage.store.IndexStore` is the door; `docs/format.md` describes the bytes. Nothing is imported here, so
that importing one module of the package does not load the others.
"""
