"""Triton kernels of attention with top-k; `rabatch.index.topk.launch` imports this module when it needs them.

Keys are numbered in blocks of 4 * GROUP, and a group is every fourth pair of keys of a block: of a score tile, tensor
cores leave a thread just those columns, so that the maxima of groups cost no exchange between threads, and the
maximum of a row is made of them. Groups are numbered from the first block of keys that a tile of rows reads.
"""

# mypy: disable-error-code="no-untyped-def"
# No `from __future__ import annotations`: Triton reads the annotations.
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _group_maxima(products, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr):
    """The maximum of each group of keys: [ROWS, KEYS] -> [ROWS, KEYS // GROUP]."""
    split = tl.reshape(products, [ROWS, KEYS // (4 * GROUP), GROUP // 2, 4, 2])
    return tl.reshape(tl.max(tl.max(split, axis=4), axis=2), [ROWS, KEYS // GROUP])


@triton.jit
def _key_of(group, member, GROUP: tl.constexpr):
    """Where member 0 <= member < GROUP of a group stands, in keys from the first of group 0."""
    return group // 4 * (4 * GROUP) + member // 2 * 8 + group % 4 * 2 + member % 2


@triton.jit
def _capped(products, to_cap, cap):
    """cap * tanh(x), by tanh(x) = 1 - 2 / (exp(2x) + 1), where exp(2x) = exp2(products * to_cap)."""
    return cap - 2 * cap / (tl.exp2(products * to_cap) + 1)


@triton.jit
def _dot(left, right, onto):
    """onto + left @ right, in float32."""
    if INTERPRETED:  # whose matrix product takes the bits of bfloat16 for whole numbers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, onto, input_precision="ieee")


@triton.jit
def _load(
    states, row_stride, start, first, stop,
    DIM: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + KEYS - 1 of one head: [KEYS, WIDE]. If EDGE, 0 for all but first .. stop - 1."""
    rows = tl.arange(0, KEYS)
    dims = tl.arange(0, WIDE)
    states += start * tl.cast(row_stride, tl.int64)
    at = states + (rows[:, None] * row_stride + dims[None, :])
    if EDGE:
        within = (start + rows >= first) & (start + rows < stop)
        block = tl.load(at, mask=within[:, None] & (dims < DIM)[None, :], other=0.0)
    elif DIM < WIDE:
        block = tl.load(at, mask=(dims < DIM)[None, :], other=0.0)
    else:
        block = tl.load(at)
    return block


# Compiled once, whatever the sizes of a call are: Triton would else compile anew for multiples of 16, and for 1.
_SIZES = ("n_tiles", "n_rows", "n_sampled", "n_slots", "n_chosen", "window")


@triton.jit(do_not_specialize=_SIZES)
def attend_tiles(
    queries, keys, values, out, lse, tiles, slots, lower, upper, first_slots, maxima,
    query_head_stride, query_row_stride, key_head_stride, key_row_stride, value_head_stride, value_row_stride,
    n_tiles, n_rows, n_sampled, n_slots, n_groups, window, scale, cap,
    HEADS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, WIDE: tl.constexpr,
    VALUE_WIDE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr, CAPPED: tl.constexpr,
    SAMPLED: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of rows under one query head; the maxima of its sampled rows' groups of keys.

    Programs: SHARED (the query heads of a KV head) times the tiles times the KV heads, the first running fastest.

    Args:
        queries, keys, values: [HEADS, n_rows, DIM], [HEADS // SHARED, n_keys, DIM or VALUE_DIM]; the last dimension
            is contiguous. Keys and values are converted to the dtype of the queries.
        out, lse: [n_rows, HEADS, VALUE_DIM] and float32 [HEADS, n_rows], contiguous.
        tiles: int32 [n_tiles, 4]: first row, past the last row (at most ROWS on), first key of the span, key position
            of the first row.
        slots: int32 [1 or HEADS, n_rows]: where a row stands in the sample, -1 where it does not. The second size if
            BY_HEAD.
        lower, upper: int32 [1 or HEADS, n_sampled], by slot: the keys that count are lower <= key < upper, all of
            them visible.
        first_slots: int32 [1 or HEADS]: the slot at which `maxima` begins.
        maxima: float32 [HEADS, n_slots, n_groups]: of q . k, unscaled. Written for groups that hold a key that counts;
            blocks of keys that count for a part of the sampled rows only, or in part, are multiplied once more for it.
        window: Keys that a row sees, itself the last.
        scale: log2(e) * scaling; with CAPPED, 2 * log2(e) * scaling / softcap.
        cap: log2(e) * softcap.
    """
    program = tl.program_id(0)
    tile = program // SHARED % n_tiles
    kv_head = program // SHARED // n_tiles
    head = kv_head * SHARED + program % SHARED
    row_start = tl.load(tiles + tile * 4)
    row_stop = tl.load(tiles + tile * 4 + 1)
    first_key = tl.load(tiles + tile * 4 + 2)
    position = tl.load(tiles + tile * 4 + 3)
    queries += tl.cast(head, tl.int64) * query_head_stride
    keys += tl.cast(kv_head, tl.int64) * key_head_stride
    values += tl.cast(kv_head, tl.int64) * value_head_stride

    # Rows past the last one of the tile stand where the last one does; nothing of them is stored.
    rows = row_start + tl.arange(0, ROWS)
    stop_key = position + row_stop - row_start
    positions = tl.minimum(position + tl.arange(0, ROWS), stop_key - 1)
    row_first = tl.maximum(positions - window + 1, first_key)
    first = tl.maximum(position - window + 1, first_key)
    query = _load(queries, query_row_stride, row_start, row_start, row_stop, DIM, WIDE, ROWS, True)

    # Blocks of keys: all of begin .. end - 1 are read, and whole .. whole_end - 1 are visible to every row.
    begin = first // KEYS
    end = tl.cdiv(stop_key, KEYS)
    whole = tl.cdiv(tl.maximum(stop_key - window, first_key), KEYS)
    whole_end = tl.maximum((position + 1) // KEYS, whole)
    n_whole = whole_end - whole

    # Of these, plain .. plain_end - 1 count as a whole for every sampled row; mixed .. mixed_end - 1 may count in part.
    if SAMPLED:
        map_ = tl.cast(head, tl.int64) if BY_HEAD else tl.cast(head, tl.int64) * 0
        slot = tl.load(slots + map_ * n_rows + rows, mask=rows < row_stop, other=-1)
        in_sample = slot >= 0
        row_lower = tl.load(lower + map_ * n_sampled + slot, mask=in_sample, other=0)
        row_upper = tl.load(upper + map_ * n_sampled + slot, mask=in_sample, other=0)
        mixed = tl.maximum(begin, tl.min(tl.where(in_sample, row_lower, 0x7FFFFFFF), axis=0) // KEYS)
        mixed_end = tl.minimum(end, tl.cdiv(tl.max(row_upper, axis=0), KEYS))
        plain = tl.maximum(whole, tl.cdiv(tl.max(row_lower, axis=0), KEYS))
        plain_end = tl.min(tl.where(in_sample, row_upper, 0x7FFFFFFF), axis=0) // KEYS
        plain_end = tl.maximum(tl.minimum(plain_end, tl.minimum(whole_end, mixed_end)), plain)
        line = tl.cast(head, tl.int64) * n_slots + (slot - tl.load(first_slots + map_))
        lines = maxima + (line * n_groups)[:, None] + tl.arange(0, KEYS // GROUP)[None, :]

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, VALUE_WIDE], tl.float32)
    for EDGE in tl.static_range(2):
        n_blocks = end - begin - n_whole if EDGE else n_whole
        for i in range(n_blocks):
            if EDGE:
                block = begin + i
                block += tl.where(block >= whole, n_whole, 0)
            else:
                block = whole + i
            start = block * KEYS
            columns = start + tl.arange(0, KEYS)
            key = _load(keys, key_row_stride, start, first, stop_key, DIM, WIDE, KEYS, EDGE)
            products = _dot(query, tl.trans(key.to(query.dtype)), tl.zeros([ROWS, KEYS], tl.float32))
            if EDGE:
                seen = (columns[None, :] >= row_first[:, None]) & (columns[None, :] <= positions[:, None])
                products = tl.where(seen, products, float("-inf"))
            highest = _group_maxima(products, ROWS, KEYS, GROUP)
            if SAMPLED and not EDGE:  # noqa: SIM102, one is known when this is compiled, the other is not
                if (block >= plain) & (block < plain_end):
                    tl.store(lines + (block - begin) * (KEYS // GROUP), highest, mask=in_sample[:, None])
            row_best = tl.max(highest, axis=1)
            if CAPPED:
                logits = _capped(products, scale, cap)
                if EDGE:
                    logits = tl.where(seen, logits, float("-inf"))
                new_best = tl.maximum(best, _capped(row_best, scale, cap))
            else:
                logits = products * scale
                new_best = tl.maximum(best, row_best * scale)
            base = new_best
            if EDGE:  # a row may have seen nothing yet
                base = tl.where(new_best == float("-inf"), 0.0, new_best)
            weights = tl.exp2(logits - base[:, None])
            factor = tl.exp2(best - base)
            total = total * factor + tl.sum(weights, axis=1)
            value = _load(values, value_row_stride, start, first, stop_key, VALUE_DIM, VALUE_WIDE, KEYS, EDGE)
            sums = _dot(weights.to(query.dtype), value.to(query.dtype), sums * factor[:, None])
            best = new_best

    if SAMPLED:
        for i in range(mixed_end - mixed - (plain_end - plain)):
            block = mixed + i
            block += tl.where(block >= plain, plain_end - plain, 0)
            start = block * KEYS
            columns = start + tl.arange(0, KEYS)
            key = _load(keys, key_row_stride, start, first, stop_key, DIM, WIDE, KEYS, True)
            products = _dot(query, tl.trans(key.to(query.dtype)), tl.zeros([ROWS, KEYS], tl.float32))
            counts = (columns[None, :] >= row_lower[:, None]) & (columns[None, :] < row_upper[:, None])
            highest = _group_maxima(tl.where(counts, products, float("-inf")), ROWS, KEYS, GROUP)
            tl.store(lines + (block - begin) * (KEYS // GROUP), highest, mask=in_sample[:, None])

    dims = tl.arange(0, VALUE_WIDE)
    real = rows < row_stop
    at = out + (tl.cast(rows, tl.int64) * HEADS + head)[:, None] * VALUE_DIM + dims[None, :]
    result = (sums / total[:, None]).to(out.dtype.element_ty)
    tl.store(at, result, mask=real[:, None] & (dims < VALUE_DIM)[None, :])
    natural = (best + tl.log2(total)) * 0.6931471805599453
    tl.store(lse + tl.cast(head, tl.int64) * n_rows + rows, natural, mask=real)


@triton.jit(do_not_specialize=_SIZES)
def score_groups(
    queries, keys, rows, lower, upper, base, first_slots, groups, scores, ids,
    query_head_stride, query_row_stride, key_head_stride, key_row_stride, n_sampled, n_slots, n_chosen, scaling,
    SHARED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SLOTS: tl.constexpr,
    KEYS: tl.constexpr, BY_HEAD: tl.constexpr,
):  # fmt: skip
    """Scores of the keys of the groups chosen for SLOTS sampled rows, under one query head.

    Programs: SHARED times ceil(n_slots / SLOTS) times the KV heads, the first running fastest.

    Args:
        queries, keys, lower, upper, first_slots: As in `attend_tiles`.
        rows, base: int32 [1 or heads, n_sampled], by slot: the row, and the key at which group 0 begins.
        groups: int64 [heads, n_slots, n_chosen].
        scores, ids: float32 and int32 [heads, n_slots, n_chosen * GROUP], written: scaling * (q . k), -inf for keys
            that do not count; and the keys.
        KEYS: Scored at a time, of each row.
    """
    program = tl.program_id(0)
    n_tiles = tl.cdiv(n_slots, SLOTS)
    kv_head = program // SHARED // n_tiles
    head = kv_head * SHARED + program % SHARED
    map_ = tl.cast(head, tl.int64) if BY_HEAD else tl.cast(head, tl.int64) * 0
    at = program // SHARED % n_tiles * SLOTS + tl.arange(0, SLOTS)
    slot = tl.load(first_slots + map_) + at
    real = (at < n_slots) & (slot < n_sampled)
    slot += map_ * n_sampled
    row = tl.load(rows + slot, mask=real, other=0)
    least = tl.load(lower + slot, mask=real, other=0)
    limit = tl.load(upper + slot, mask=real, other=0)
    start = tl.load(base + slot, mask=real, other=0)
    dims = tl.arange(0, WIDE)
    queries += tl.cast(head, tl.int64) * query_head_stride
    keys += tl.cast(kv_head, tl.int64) * key_head_stride
    query = tl.load(
        queries + (tl.cast(row, tl.int64) * query_row_stride)[:, None] + dims[None, :],
        mask=real[:, None] & (dims < DIM)[None, :],
        other=0.0,
    ).to(tl.float32)
    line = (tl.cast(head, tl.int64) * n_slots + at)[:, None]
    for done in range(0, n_chosen * GROUP, KEYS):
        places = done + tl.arange(0, KEYS)[None, :]
        ours = (places < n_chosen * GROUP) & real[:, None]
        group = tl.load(groups + line * n_chosen + places // GROUP, mask=ours, other=0).to(tl.int32)
        key = start[:, None] + _key_of(group, places % GROUP, GROUP)
        counts = ours & (key >= least[:, None]) & (key < limit[:, None])
        pointers = keys + (tl.cast(key, tl.int64) * key_row_stride)[:, :, None] + dims[None, None, :]
        mask = counts[:, :, None] & (dims < DIM)[None, None, :]
        block = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        products = tl.sum(block * query[:, None, :], axis=2) * scaling
        to = line * (n_chosen * GROUP) + places
        tl.store(scores + to, tl.where(counts, products, float("-inf")), mask=ours)
        tl.store(ids + to, key, mask=ours)
