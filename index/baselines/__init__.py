"""The indexes that the attention-aware graph is measured against; built for that, not for serving.

All of them search inner products by the reduction of `lift.Reduction`, without which graphs over keys miss most.
HNSW and IVF are saved as what faiss serialises, and faiss checks little of what it reads: a table of theirs must come
from a trusted place. Nothing of the store reads them.
"""
