"""Ask a local store with SQL: DuckDB reads its manifests (JSON) and its parts (Parquet) where they lie.

    python examples/query_sql.py STORE

Needs `duckdb`. The same files are read with pyarrow in query_store.py.
"""

from __future__ import annotations

import sys

import duckdb

DOCUMENTS = """
    SELECT document_id, context_tokens, round(list_sum(list_transform(parts, lambda part: part.bytes)) / 1e6, 2)
    FROM read_json_auto('{store}/manifests/*/*.json') ORDER BY document_id
"""
PART = """
    SELECT part.path, part.layer FROM (
        SELECT unnest(parts) AS part, document_id FROM read_json_auto('{store}/manifests/*/*.json')
    ) WHERE part.kind = '{kind}' ORDER BY document_id, part.layer LIMIT 1
"""
COVERED = "SELECT count(*), max(char_end) FROM '{part}'"
# One row per token, one row group per KV head: heads follow each other.
TOKENS = "SELECT count(*), count(DISTINCT position), octet_length(any_value(key)) FROM '{part}'"
ZONES = """
    SELECT zone, count(*) AS keys FROM (SELECT zone, row_number() OVER () AS row FROM '{part}')
    WHERE row <= {tokens} AND zone != '\\xFF\\xFF'::BLOB GROUP BY zone ORDER BY keys DESC, zone LIMIT 3
"""


def main(store: str) -> int:
    for document_id, tokens, megabytes in duckdb.sql(DOCUMENTS.format(store=store)).fetchall():
        print(f"{document_id}: {tokens} tokens, {megabytes} MB")
    path = duckdb.sql(PART.format(store=store, kind="tokens")).fetchall()[0][0]
    n, characters = duckdb.sql(COVERED.format(part=f"{store}/{path}")).fetchall()[0]
    print(f"\ntokens of the first document: {n}, of {characters} characters")
    path, layer = duckdb.sql(PART.format(store=store, kind="layer")).fetchall()[0]
    rows, n, width = duckdb.sql(TOKENS.format(part=f"{store}/{path}")).fetchall()[0]
    print(f"its layer {layer}: {rows // n} KV heads of {n} tokens, keys of {width} bytes")
    for zone, keys in duckdb.sql(ZONES.format(part=f"{store}/{path}", tokens=n)).fetchall():
        print(f"  zone {int.from_bytes(zone, 'little')} of its first head: {keys} keys")
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
