"""Attention between segments of tokens, from a dense boolean mask.

VAR (arXiv 2404.02905) and its kin: a segment is a scale's grid, a text, a block. A table says what the tokens of one
segment see of another; `visible` makes the mask token by token from that alone, and nothing here knows of tiles.
"""

import torch

# What a segment sees of another. WINDOWS + i: the window whose reach is row i of `windows`.
HIDDEN, FULL, CAUSAL, COLUMN, WINDOWS = range(5)


def tokens(segments):
    """Of each token: its segment, its number within it, and its place [frame, row, column]; all int64.

    segments: [n, 3] frames, height, width. Tokens lie frame by frame, row by row.
    """
    of, number, place = [], [], []
    for index, (frames, height, width) in enumerate(segments.tolist()):
        count = frames * height * width
        of.append(torch.full([count], index))
        number.append(torch.arange(count))
        grid = [torch.arange(size) for size in (frames, height, width)]
        place.append(torch.cartesian_prod(*grid).reshape(count, 3))
    nothing = torch.zeros(0, dtype=torch.int64)
    return torch.cat([nothing, *of]), torch.cat([nothing, *number]), torch.cat([nothing.reshape(0, 3), *place])


def visible(segments_q, segments_k, rules, windows=None):
    """[queries, keys] bool: who sees whom.

    segments_q, segments_k: [n, 3] and [m, 3] integers; rules: [n, m], the codes above; windows: [w, 3], how many
    frames, rows and columns to either side.
    """
    segment_q, number_q, place_q = tokens(segments_q)
    segment_k, number_k, place_k = tokens(segments_k)
    rule = rules.long()[segment_q][:, segment_k]
    seen = (rule == FULL) | ((rule == CAUSAL) & (number_k[None, :] <= number_q[:, None]))

    # By columns: the order of (frame, column, row).
    (t, y, x), (tk, yk, xk) = place_q.T[:, :, None], place_k.T[:, None, :]
    earlier = (tk < t) | ((tk == t) & ((xk < x) | ((xk == x) & (yk <= y))))
    seen |= (rule == COLUMN) & earlier

    for index, reach in enumerate([] if windows is None else windows.tolist()):
        near = torch.ones_like(seen)
        for axis in range(3):
            # The middle of the query's cell, in the cells of the keys.
            size_q, size_k = segments_q[segment_q, axis].long(), segments_k[segment_k, axis].long()
            middle = (2 * place_q[:, axis] + 1)[:, None] * size_k[None, :] // (2 * size_q)[:, None]
            near &= (place_k[None, :, axis] - middle).abs() <= reach[axis]
        seen |= (rule == WINDOWS + index) & near
    return seen


def exists(segments_k, segment_lengths, lengths):
    """[batch, kv_heads, keys] bool: which keys there are.

    segment_lengths: [m], the index of each segment's length, or -1; lengths: [n, batch, kv_heads] or None.
    """
    segment, number, _ = tokens(segments_k)
    if lengths is None:
        return torch.ones(1, 1, len(number), dtype=torch.bool)
    index = segment_lengths.long()[segment]
    length = lengths.long()[index.clamp(min=0)].permute(1, 2, 0)
    return (index < 0) | (number < length)


def read(shape, batch, seen, there=None, kv_offset=None):
    """[kv_batch, kv_rows, kv_heads] bool: the rows of k and v that anyone sees. All others may hold anything.

    shape: that of k. seen, there, kv_offset: as for `scale_attention`.
    """
    entries, kv_rows, kv_heads = shape[:3]
    used = torch.zeros(entries, kv_rows, kv_heads, dtype=torch.bool)
    for b in range(batch):
        mine = seen.any(0).expand(kv_heads, -1)
        if there is not None:
            mine = mine & there[min(b, len(there) - 1)]
        entry, first = (b, 0) if kv_offset is None else (0, int(kv_offset[b]))
        mine = mine.T[: kv_rows - first]
        used[entry, first : first + len(mine)] |= mine
    return used


def attention(q, k, v, seen, scale, dtype=torch.float64):
    """(out, log-sum-exp) of one head of one batch entry, computed in `dtype`.

    q: [rows, dim], k, v: [keys, dim], seen: [rows, keys] bool. A row that sees nothing gives 0 and -inf. What nobody
    sees has no influence, NaN included. With `dtype` that of q this is the usual expression, rounded at each step.
    """
    used = seen.any(0)[:, None]
    q, k, v = (x.to(dtype) for x in (q, k.masked_fill(~used, 0), v.masked_fill(~used, 0)))
    # In 16 bits the order of FlashAttention's tests: scaled before the product.
    logits = (q @ (k * scale).T).masked_fill(~seen, -torch.inf)
    empty = ~seen.any(1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(empty | ~seen, 0)
    return weights @ v, torch.logsumexp(logits, -1)


def scale_attention(q, k, v, seen, scale, there=None, row_index=None, kv_offset=None, dtype=torch.float64):
    """(out [batch, rows, heads, dim], lse [batch, heads, rows]) in `dtype`.

    q: [batch, q_rows, heads, dim], k, v: [batch, kv_rows, kv_heads, dim], seen: [rows, keys], there: [batch, kv_heads,
    keys] or None, row_index: [batch, rows] or None, kv_offset: [batch] or None; with it k and v have one batch entry.
    """
    batch, (rows, keys), heads = len(q), seen.shape, q.shape[2]
    out = torch.zeros(batch, rows, heads, q.shape[3], dtype=dtype)
    lse = torch.zeros(batch, heads, rows, dtype=dtype)
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            mask = seen if there is None else seen & there[min(b, len(there) - 1), min(g, there.shape[1] - 1)]
            rows_of_q = q[b, :rows, h] if row_index is None else q[b, row_index[b].long(), h]
            entry, first = (b, 0) if kv_offset is None else (0, int(kv_offset[b]))
            kept = [x[entry, first : first + keys, g] for x in (k, v)]
            # The last keys of a packed batch need not be in memory where their lengths end before.
            missing = keys - len(kept[0])
            kept = [torch.cat([x, x.new_zeros(missing, x.shape[1])]) for x in kept] if missing else kept
            out[b, :, h], lse[b, h] = attention(rows_of_q, *kept, mask, scale, dtype)
    return out, lse


def usual(q, k, v, seen, scale, **more):
    """What PyTorch's expressions give in the dtype of the inputs, in f64: their error is the measure of a kernel's."""
    out, _ = scale_attention(q, k, v, seen, scale, **more, dtype=q.dtype)
    return out.double()
