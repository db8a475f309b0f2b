"""llama.cpp decoding questions over one prefilled context: the peer of benchmarks/decode.py.

    python benchmarks/llama_peer.py request.json

Run by an interpreter that has `llama-cpp-python`, `gguf` and `numpy`; neither rabatch nor torch is needed. The request
holds the arguments of `measure` and, in case the GGUF file is yet to be written, the folder `checkpoint` and the type
of `weights`; one line of JSON is printed. The context is prefilled once, into a KV cache of float16 that all questions
share: a question adds only cells of its own. The tokens come back with the seconds, so that the caller can refuse to
report the seconds of a wrong result.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 2048  # tokens that one call takes at most
Entry = tuple[int, int, int, bool]  # token, position, sequence, whether its logits are wanted


class Peer:
    """A model and its KV cache. Sequence 0 is the context; question i continues it as sequence i."""

    def __init__(self, gguf: Path, *, cells: int, sequences: int, threads: int, flash: bool) -> None:
        self.llama = llama = llama_cpp
        self.quiet = llama.llama_log_callback(lambda *_: None)  # kept, since the library keeps calling it
        llama.llama_log_set(self.quiet, ctypes.c_void_p())
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(gguf).encode(), settings)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        wanted = llama.llama_context_default_params()
        wanted.n_ctx, wanted.n_seq_max, wanted.n_batch = cells, sequences, BATCH
        wanted.n_threads = wanted.n_threads_batch = threads
        wanted.type_k = wanted.type_v = llama.GGML_TYPE_F16
        wanted.flash_attn_type, wanted.kv_unified = int(flash), True
        self.context = llama.llama_init_from_model(self.model, wanted)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {cells} cells for {gguf}")
        self.memory = llama.llama_get_memory(self.context)
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(BATCH, 0, 1)

    def forward(self, entries: list[Entry]) -> tuple[np.ndarray, float]:
        """Logits [wanted, vocabulary], and the seconds that llama.cpp itself took."""
        llama, batch, logits, seconds = self.llama, self.batch, [], 0.0
        for start in range(0, len(entries), BATCH):
            part = entries[start : start + BATCH]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            began = time.perf_counter()
            code = llama.llama_decode(self.context, batch)
            llama.llama_synchronize(self.context)
            seconds += time.perf_counter() - began
            if code != 0:
                raise RuntimeError(f"llama_decode returned {code}")
            rows = [llama.llama_get_logits_ith(self.context, i) for i, entry in enumerate(part) if entry[3]]
            logits += [np.ctypeslib.as_array(row, shape=(self.n_vocab,)).copy() for row in rows]
        return np.array(logits), seconds

    def prefill(self, token_ids: list[int], state: Path | None) -> float | None:
        """Makes `token_ids` sequence 0. Seconds; None where the file `state` had it, which is written otherwise."""
        n, file = len(token_ids), str(state).encode()
        stored, count = (self.llama.llama_token * n)(), ctypes.c_size_t()
        if state is not None and state.exists():
            loaded = self.llama.llama_state_seq_load_file(self.context, file, 0, stored, n, ctypes.byref(count))
            if loaded and stored[: count.value] == token_ids:
                return None
            self.llama.llama_memory_clear(self.memory, True)
        seconds = self.forward([(token, i, 0, False) for i, token in enumerate(token_ids)])[1]
        if state is not None:
            stored[:] = token_ids
            self.llama.llama_state_seq_save_file(self.context, file, 0, stored, n)
        return seconds

    def ask(self, n: int, questions: list[list[int]], steps: int) -> dict[str, Any]:
        """Enters questions after the `n` tokens of the context and decodes greedily; forgets them afterwards."""
        for sequence in range(1, len(questions)):
            self.llama.llama_memory_seq_cp(self.memory, 0, sequence, 0, n)
        entered = [(t, n + i, s, i == len(q) - 1) for s, q in enumerate(questions) for i, t in enumerate(q)]
        logits, asked = self.forward(entered)
        tokens, seconds = [logits.argmax(-1).tolist()], []
        for step in range(steps):
            chosen = [(tokens[-1][s], n + len(q) + step, s, True) for s, q in enumerate(questions)]
            logits, elapsed = self.forward(chosen)
            tokens.append(logits.argmax(-1).tolist())
            seconds.append(elapsed)
        for sequence in range(len(questions)):
            self.llama.llama_memory_seq_rm(self.memory, sequence, n if sequence == 0 else -1, -1)
        found = {"questions": len(questions), "question_seconds": asked, "step_seconds": seconds}
        return {**found, "tokens": [list(of_question) for of_question in zip(*tokens, strict=True)]}

    def close(self) -> None:
        self.llama.llama_batch_free(self.batch)
        self.llama.llama_free(self.context)
        self.llama.llama_model_free(self.model)


def measure(
    gguf: Path,
    token_ids: list[int],
    questions: list[list[int]],
    steps: int,
    threads: int,
    *,
    counts: list[int] | None = None,
    flash: bool = False,
    state: Path | None = None,
) -> dict[str, Any]:
    """Seconds of decode steps over the context `token_ids`, and the tokens chosen.

    Args:
        counts: Numbers of questions decoded in parallel, the first ones; None: one, and all.
        flash: Whether attention is llama.cpp's fused one. Its own default, but not always the faster one on a CPU:
            measure both.
        state: A file that keeps the prefilled context for later calls with the same model and `flash`.

    Returns:
        `prefill_seconds` (None: it came from `state`), `version`, `system` (what the library was compiled for) and
        `runs`, one for each count: `questions`, `question_seconds` (entering all of them), `step_seconds` [steps] and
        `tokens` [questions][1 + steps], the first of them chosen after the question.
    """
    cells = len(token_ids) + sum(len(question) + steps for question in questions)
    peer = Peer(gguf, cells=cells, sequences=len(questions), threads=threads, flash=flash)
    found = {"version": peer.llama.__version__, "system": peer.llama.llama_print_system_info().decode().strip()}
    found["prefill_seconds"] = peer.prefill(token_ids, state)
    found["runs"] = [peer.ask(len(token_ids), questions[:n], steps) for n in counts or sorted({1, len(questions)})]
    peer.close()
    return found


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("measures nothing without a request: see the first lines of the file")
        return
    request = json.loads(Path(sys.argv[1]).read_text())
    checkpoint, weights = request.pop("checkpoint", None), request.pop("weights", "f16")
    paths = {name: Path(request[name]) for name in ("gguf", "state") if request.get(name)}
    if checkpoint is not None and not paths["gguf"].exists():
        from gguf_model import write_gguf

        write_gguf(Path(checkpoint), paths["gguf"], weights=weights)
    print(json.dumps(measure(**{**request, **paths})))


if __name__ == "__main__":
    main()
