#!/usr/bin/env python3
"""Writes tests/golden/: what the references answer, for tests that have no Python.

`rvq_decode.safetensors`. Metadata: `cases`, a JSON list, one object a case:
    name        prefix of the case's tensors
    rows_first  bool: codes are [.., rows, levels], else [.., levels, rows]
    shared      bool: codebooks are [entries, dim], else [levels, entries, dim]
    null_code   integer or null
    batch       integer or null: null says that codes and out have no batch dimension
    levels, rows, entries, dim, codes, codebooks, out   sizes and dtypes, as the tensors have them
  Tensors of a case:
    <name>.codes      u16, u32 or i64
    <name>.codebooks  f32, f16 or bf16
    <name>.out        [batch, rows, dim] or [rows, dim]: the f32-sequential sum rounded once; equal bit for bit
    <name>.exact      f64, the shape of out: the sum in f64

`philox.safetensors`. Metadata: `cases`, a JSON list, one object a case:
    name, positions, domain, draw; seed and first_position as strings (JSON readers may lose bits of 64)
  Tensors of a case:
    <name>.words     u32 [positions, 4]
    <name>.uniforms  f32 [positions, 4]
  and the known answers published with Random123:
    known.counter u32 [n, 4], known.key u32 [n, 2], known.words u32 [n, 4]

`scale_attention.safetensors`. Metadata: `cases`, a JSON list, one object a case:
    name, dtype; batch, heads, kv_heads, dim; rows, keys: tokens of the segments
    queries, keys_of  lists of [frames, height, width]; rules [n][m] and windows as `op scale_attention --help` says
    segment_lengths   list of the index of each segment's length, or -1
    lengths           null, or how many there are
    kv_rows, q_rows   rows of k and v, and of q
    gathered, packed  bool: there is a row_index, a kv_offset (then k and v have one batch entry)
    scale             null for 1 / sqrt(dim)
    bound             null, or what no scaled logit exceeds
  Tensors of a case:
    <name>.q, .k, .v   [batch, q_rows | kv_rows, heads | kv_heads, dim]; NaN where nothing may be read
    <name>.lengths     i32 [lengths, batch, kv_heads], <name>.row_index i32 [batch, rows], <name>.kv_offset i32 [batch]
    <name>.out         f32 [batch, rows, heads, dim]: the result in f64, rounded; <name>.lse f32 [batch, heads, rows]
    <name>.magnitude   f32 [batch, rows, heads]: the greatest over dim of the same with |v| for v, for error bounds

`attention_merge.safetensors`. Metadata: `cases`, a JSON list, one object a case:
    name, parts, batch, rows, heads, dim, in, out: sizes and dtypes; accumulate: bool: old_out and old_lse are there
  Tensors of a case:
    <name>.parts  [parts, batch, rows, heads, dim], <name>.lse f32 [parts, batch, heads, rows]
    <name>.old_out [batch, rows, heads, dim] of out's dtype, <name>.old_lse f32 [batch, heads, rows]
    <name>.exact, <name>.exact_lse    f64, the result
    <name>.bound, <name>.bound_lse    f64, how far from it one may be, the rounding to out's dtype not counted

`attention_prepare.safetensors`. Metadata: `cases`, a JSON list, one object a case:
    name, batch, rows, heads, kv_heads, dim, cache_rows, append_at, in, out, cache: sizes and dtypes
    norm ("none", "l2", "rms"), eps, rope ("none", "interleaved", "half"), axes, full_table, rotary_dim
    position: of row 0, or null: they are in <name>.positions
  Tensors of a case:
    <name>.q [batch, rows, heads, dim], <name>.k and <name>.v [batch, rows, kv_heads, dim]
    <name>.cos and <name>.sin f32 [table_rows, columns], <name>.positions i32 [batch, rows]; with a rope
    <name>.q_weight and <name>.k_weight f32 [dim] with "rms"; <name>.q_multiplier f32 [heads] with "l2"
    <name>.exact_q, <name>.exact_k, <name>.exact_v    f64, the new rows
    <name>.bound_q, <name>.bound_k    f64, as above; v is exact but for its rounding

The same bytes every time: seeds are fixed, and random values are drawn from Philox itself, not from a library whose
generator may change.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

from nextscale_ref import attention, philox, rvq, scale_attention

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
LARGEST = 64 * 1024
DTYPES = {
    "u16": torch.uint16,
    "u32": torch.uint32,
    "i64": torch.int64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}

# name, batch, levels, rows, entries, dim, codes, codebooks, out, and what is special.
RVQ_CASES = [
    ("encodec", None, 8, 5, 5, 32, "u32", "f32", "f32", {}),
    ("batch", 3, 4, 5, 6, 12, "i64", "f32", "f32", {}),
    ("rows_first", None, 4, 6, 12, 16, "u32", "f32", "bf16", {"rows_first": True}),
    ("shared_rows_first", 2, 4, 3, 20, 8, "i64", "f32", "f32", {"rows_first": True, "shared": True}),
    ("shared", None, 5, 4, 9, 24, "u16", "bf16", "bf16", {"shared": True}),
    ("null_minus_one", 2, 6, 3, 5, 8, "i64", "f32", "f32", {"null_code": -1}),
    ("null_in_range", None, 6, 7, 8, 16, "u16", "f16", "f32", {"null_code": 3}),
    ("null_beyond", None, 3, 5, 8, 12, "u16", "f32", "f16", {"null_code": 65535}),
    ("odd_dim", None, 7, 9, 8, 13, "u16", "f32", "f32", {}),
    ("odd_dim_16_bit", 2, 5, 3, 6, 7, "u32", "bf16", "f32", {}),
    ("one_dim", None, 3, 4, 5, 1, "i64", "f16", "f16", {}),
    ("one_level", None, 1, 5, 7, 16, "u32", "bf16", "f16", {}),
    ("many_levels", None, 19, 3, 3, 10, "u16", "f32", "f32", {}),
    ("f16", 2, 8, 4, 10, 16, "u16", "f16", "f16", {}),
    ("f16_to_bf16", None, 9, 4, 8, 16, "u32", "f16", "bf16", {}),
    ("bf16", None, 8, 4, 9, 16, "i64", "bf16", "bf16", {}),
    ("f32_to_f16", 2, 3, 4, 8, 20, "u32", "f32", "f16", {}),
    ("one_row", None, 8, 1, 4, 36, "u32", "f32", "f32", {}),
]

# name, positions, seed, first_position, domain, draw
PHILOX_CASES = [
    ("zero", 8, 0, 0, 0, 0),
    ("seeded", 33, 0x0123456789ABCDEF, 0, 0, 0),
    ("far", 16, 42, 2**40 + 12345, 7, 3),
    ("carry", 8, 42, 2**32 - 4, 1, 0),
    ("wraps", 8, 2**64 - 1, 2**64 - 4, 2**32 - 1, 2**32 - 1),
]


VAR = [[1, 1, 1], [1, 2, 2], [1, 3, 3]]
CAUSAL = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
# name, dtype, batch, heads, kv_heads, dim, segments of queries, of keys (None: the same), rules, and what is special.
SCALE_ATTENTION_CASES = [
    ("var", "bf16", 2, 2, 2, 16, VAR, None, CAUSAL, {}),
    ("diagonal", "f16", 1, 2, 2, 8, VAR, None, [[1, 0, 0], [0, 1, 0], [0, 0, 1]], {}),
    # Two clean blocks, then two noised ones.
    ("skip_causal", "f16", 1, 2, 1, 24, [[1, 2, 2]] * 4, None,
     [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]], {}),
    ("orders", "bf16", 1, 1, 1, 8, [[1, 1, 5], [2, 2, 3]], None, [[2, 0], [1, 3]], {}),
    ("windows", "f32", 1, 1, 1, 8, [[2, 2, 3]], [[1, 1, 1], [1, 3, 4], [2, 4, 2]], [[1, 4, 5]],
     {"windows": [[1, 0, 1], [0, 1, 0]]}),
    ("step", "bf16", 2, 4, 2, 16, [[1, 3, 3]], VAR, [[1, 1, 1]], {"kv_rows": 17}),
    ("lengths", "f16", 2, 2, 2, 16, [[1, 2, 2]], [[1, 1, 6], [1, 2, 2], [1, 1, 3]], [[1, 1, 1]],
     {"segment_lengths": [0, -1, 1], "lengths": [[[6, 2], [0, 5]], [[0, 1], [3, 2]]]}),
    ("gathered", "bf16", 2, 2, 2, 8, [[1, 1, 5]], VAR, [[1, 1, 1]],
     {"q_rows": 9, "row_index": [[8, 0, 3, 3, 5], [1, 2, 7, 6, 0]]}),
    ("hidden", "f16", 1, 2, 2, 8, [*VAR[:2], [1, 1, 3]], None, [[1, 0, 0], [1, 1, 0], [0, 0, 0]], {}),
    ("packed", "bf16", 3, 2, 1, 16, [[1, 1, 3]], [[1, 1, 7]], [[1]],
     {"segment_lengths": [0], "lengths": [[[2], [7], [4]]], "kv_offset": [1, 3, 10], "kv_rows": 15}),
    ("bounded", "bf16", 1, 2, 2, 8, VAR, None, CAUSAL, {"scale": 0.5, "bound": 16.0}),
]

# name, parts, batch, rows, heads, dim, in, out, spread of the lse, accumulate
MERGE_CASES = [
    ("split", 4, 2, 3, 2, 16, "f32", "bf16", 8, False),
    ("intervals", 2, 1, 4, 2, 24, "bf16", "bf16", 3, False),
    ("ring", 1, 2, 3, 2, 16, "bf16", "f32", 6, True),
    ("many", 19, 1, 2, 2, 8, "f32", "f32", 40, False),
    ("odd", 3, 1, 3, 1, 13, "f16", "f16", 5, True),
    ("far_apart", 3, 1, 4, 2, 8, "f32", "f32", 150, False),
]

# name, batch, rows, heads, kv_heads, dim, cache_rows, append_at, in, out, cache, norm, rope, and what is special.
PREPARE_CASES = [
    ("var", 2, 2, 2, 2, 16, 4, 1, "f16", "f16", "f16", "l2", "none", {}),
    ("infinity", 1, 3, 2, 2, 16, 4, 1, "bf16", "bf16", "bf16", "l2", "interleaved", {}),
    ("infinity_star", 1, 3, 4, 1, 16, 4, 0, "bf16", "f32", "bf16", "rms", "interleaved", {}),
    ("acdit", 1, 2, 2, 2, 16, 3, 1, "f32", "f32", "f32", "rms", "half", {"full_table": True}),
    ("llama", 2, 1, 4, 2, 16, 5, 3, "bf16", "bf16", "bf16", "none", "half", {}),
    ("axes", 1, 2, 2, 1, 24, 3, 1, "f32", "bf16", "f16", "none", "half", {"axes": 3}),
    ("partial", 1, 2, 2, 1, 20, 3, 0, "f16", "f32", "f32", "rms", "half", {"rotary_dim": 12}),
    ("gathered", 2, 2, 2, 1, 8, 3, 0, "f32", "f32", "f32", "l2", "interleaved", {"gather": True}),
]


def random_codes(shape, entries, domain):
    """[*shape] int64 in [0, entries), from Philox words."""
    count = torch.Size(shape).numel()
    words = philox.philox_fill(-(-count // 4), seed=2026, domain=domain).to(torch.int64)
    return (words.flatten()[:count] % entries).reshape(shape)


def random_values(shape, domain):
    """[*shape] f64, from -1 to 1 times powers of two from 2^-6 to 2^6: sums cancel and round."""
    count = torch.Size(shape).numel()
    words = philox.philox_fill(-(-count // 4), seed=2026, domain=domain, draw=1).to(torch.int64).flatten()[:count]
    return ((words >> 8).double() * 2.0**-23 - 1).mul(2.0 ** ((words & 0xFF) % 13 - 6).double()).reshape(shape)


def uniform_values(shape, domain):
    """[*shape] f64 in [-2, 2)."""
    count = torch.Size(shape).numel()
    words = philox.philox_fill(-(-count // 4), seed=2026, domain=domain, draw=2).to(torch.int64).flatten()[:count]
    return ((words >> 8).double() * 2.0**-22 - 2).reshape(shape)


def scale_attention_golden():
    tensors, cases = {}, []
    for number, (name, *sizes, queries, keys, rules, special) in enumerate(SCALE_ATTENTION_CASES):
        dtype, batch, heads, kv_heads, dim = sizes
        keys = keys or queries
        segments_q, segments_k, windows = (torch.tensor(x) for x in (queries, keys, special.get("windows", [])))
        seen = scale_attention.visible(segments_q, segments_k, torch.tensor(rules), windows)
        segment_lengths = special.get("segment_lengths", [-1] * len(keys))
        given = {
            key: torch.tensor(special[key], dtype=torch.int32)
            for key in ["lengths", "row_index", "kv_offset"]
            if key in special
        }
        lengths, row_index, kv_offset = (given.get(key) for key in ["lengths", "row_index", "kv_offset"])
        there = scale_attention.exists(segments_k, torch.tensor(segment_lengths), lengths)
        rows, count = seen.shape
        q_rows, kv_rows = special.get("q_rows", rows), special.get("kv_rows", count)
        kv_batch = batch if kv_offset is None else 1
        q = uniform_values([batch, q_rows, heads, dim], 3 * number).to(DTYPES[dtype])
        k, v = (uniform_values([kv_batch, kv_rows, kv_heads, dim], 3 * number + i).to(DTYPES[dtype]) for i in (1, 2))
        unread = ~scale_attention.read(k.shape, batch, seen, there, kv_offset)
        for x in (k, v):
            x.masked_fill_(unread[..., None], torch.nan)
        if row_index is not None:
            for b in range(batch):
                q[b, sorted(set(range(q_rows)) - set(row_index[b].tolist()))] = torch.nan
        # As the library holds it: in f32.
        scale = special.get("scale") or (1 / torch.tensor(float(dim)).double().sqrt().float()).item()
        how = {"there": there, "row_index": row_index, "kv_offset": kv_offset}
        out, lse = scale_attention.scale_attention(q, k, v, seen, scale, **how)
        magnitude, _ = scale_attention.scale_attention(q, k, v.abs(), seen, scale, **how)
        tensors |= {f"{name}.{key}": tensor for key, tensor in [("q", q), ("k", k), ("v", v), *given.items()]}
        # Rounded, since the last bits of an f64 exponential are not the same everywhere.
        tensors |= {f"{name}.out": out.float(), f"{name}.lse": lse.float()}
        tensors[f"{name}.magnitude"] = magnitude.amax(-1).float()
        cases.append(
            dict(name=name, dtype=dtype, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, rows=rows, keys=count)
            | dict(queries=queries, keys_of=keys, rules=rules, windows=special.get("windows", []))
            | dict(segment_lengths=segment_lengths, lengths=None if lengths is None else len(lengths))
            | dict(kv_rows=kv_rows, q_rows=q_rows, gathered=row_index is not None, packed=kv_offset is not None)
            | dict(scale=special.get("scale"), bound=special.get("bound"))
        )
    return tensors, cases


def rvq_golden():
    tensors, cases = {}, []
    for number, (name, batch, levels, rows, entries, dim, codes_t, books_t, out_t, special) in enumerate(RVQ_CASES):
        rows_first, shared = special.get("rows_first", False), special.get("shared", False)
        null_code = special.get("null_code")
        shape = [rows, levels] if rows_first else [levels, rows]
        codes = random_codes(([batch] if batch else []) + shape, entries, domain=2 * number)
        if null_code is not None:
            # About a third of the codes.
            codes = codes.masked_fill(random_codes(codes.shape, 3, domain=1000 + number) == 0, null_code)
        codes = codes.to(DTYPES[codes_t])
        books = random_values([entries, dim] if shared else [levels, entries, dim], domain=2 * number + 1)
        books = books.to(DTYPES[books_t])
        how = {"null_code": null_code, "rows_first": rows_first}
        tensors |= {
            f"{name}.codes": codes,
            f"{name}.codebooks": books,
            f"{name}.out": rvq.rvq_decode(codes, books, DTYPES[out_t], **how),
            f"{name}.exact": rvq.rvq_decode_f64(codes, books, **how),
        }
        cases.append(
            dict(name=name, batch=batch, levels=levels, rows=rows, entries=entries, dim=dim)
            | dict(codes=codes_t, codebooks=books_t, out=out_t)
            | dict(rows_first=rows_first, shared=shared, null_code=null_code)
        )
    return tensors, cases


def random_lse(shape, spread, domain):
    """[*shape] f32 within `spread` of 0, about a sixth of them -inf."""
    lse = (random_values(shape, domain) * spread / 64).float()
    return lse.masked_fill(random_codes(shape, 6, domain) == 0, -torch.inf)


def merge_golden():
    tensors, cases = {}, []
    for number, (name, parts, batch, rows, heads, dim, in_t, out_t, spread, accumulate) in enumerate(MERGE_CASES):
        domain = 2000 + 10 * number
        values = random_values([parts, batch, rows, heads, dim], domain).to(DTYPES[in_t])
        lse = random_lse([parts, batch, heads, rows], spread, domain + 1)
        tensors |= {f"{name}.parts": values, f"{name}.lse": lse}
        old = None
        if accumulate:
            old = (
                random_values([batch, rows, heads, dim], domain + 2).to(DTYPES[out_t]),
                random_lse([batch, heads, rows], spread, domain + 3),
            )
            tensors |= {f"{name}.old_out": old[0], f"{name}.old_lse": old[1]}
        out, out_lse, bound, lse_bound = attention.merge(values, lse, old)
        tensors |= {f"{name}.exact": out, f"{name}.bound": bound}
        tensors |= {f"{name}.exact_lse": out_lse, f"{name}.bound_lse": lse_bound}
        sizes = dict(parts=parts, batch=batch, rows=rows, heads=heads, dim=dim)
        cases.append(dict(name=name) | sizes | {"in": in_t, "out": out_t, "accumulate": accumulate})
    return tensors, cases


def prepare_golden():
    tensors, cases = {}, []
    for number, (name, batch, rows, heads, kv_heads, dim, cache_rows, at, *dtypes, norm, rope, special) in enumerate(
        PREPARE_CASES
    ):
        in_t, out_t, cache_t = dtypes
        domain = 3000 + 20 * number
        full, axes = special.get("full_table", False), special.get("axes", 1)
        rotary = special.get("rotary_dim", dim)
        case = dict(name=name, batch=batch, rows=rows, heads=heads, kv_heads=kv_heads, dim=dim, cache_rows=cache_rows)
        case |= {"append_at": at, "in": in_t, "out": out_t, "cache": cache_t, "norm": norm, "rope": rope, "axes": axes}
        case |= {"full_table": full, "rotary_dim": rotary, "position": None}
        case["eps"] = {"l2": 1e-12, "rms": 1e-6}.get(norm, 0)
        how = dict(norm=norm, eps=case["eps"])
        if rope != "none":
            table_rows = rows + 4
            angles = random_values([table_rows, rotary // (1 if full else 2)], domain) / 20
            cos, sin = angles.cos().float(), angles.sin().float()
            tensors |= {f"{name}.cos": cos, f"{name}.sin": sin}
            if special.get("gather"):
                positions = random_codes([batch, rows], table_rows, domain + 1)
                tensors[f"{name}.positions"] = positions.to(torch.int32)
            else:
                case["position"] = 2
                positions = torch.arange(2, 2 + rows)
            how |= dict(rope=rope + ("-full" if full else ""), axes=axes, cos=cos[positions], sin=sin[positions])
        for of, (tensor, count) in enumerate([("q", heads), ("k", kv_heads), ("v", kv_heads)]):
            x = random_values([batch, rows, count, dim], domain + 2 + of).to(DTYPES[in_t])
            tensors[f"{name}.{tensor}"] = x
            extra = {}
            if norm == "rms" and tensor != "v":
                extra["weight"] = random_values([dim], domain + 6 + of).float()
                tensors[f"{name}.{tensor}_weight"] = extra["weight"]
            if norm == "l2" and tensor == "q":
                extra["multiplier"] = random_values([heads], domain + 9).abs().float()
                tensors[f"{name}.q_multiplier"] = extra["multiplier"]
            exact, bound = attention.prepare(x) if tensor == "v" else attention.prepare(x, **how, **extra)
            tensors[f"{name}.exact_{tensor}"] = exact
            if tensor != "v":
                tensors[f"{name}.bound_{tensor}"] = bound
        cases.append(case)
    return tensors, cases


def philox_golden():
    def words(rows):
        return torch.tensor(rows, dtype=torch.int64).to(torch.uint32)

    counters, keys, answers = zip(*philox.KNOWN_ANSWERS)
    tensors = {"known.counter": words(counters), "known.key": words(keys), "known.words": words(answers)}
    cases = []
    for name, positions, seed, first_position, domain, draw in PHILOX_CASES:
        where = dict(seed=seed, first_position=first_position, domain=domain, draw=draw)
        tensors[f"{name}.words"] = philox.philox_fill(positions, **where)
        tensors[f"{name}.uniforms"] = philox.philox_fill(positions, **where, dtype=torch.float32)
        where |= dict(seed=str(seed), first_position=str(first_position))
        cases.append(dict(name=name, positions=positions) | where)
    return tensors, cases


def golden():
    """{name of the file: (tensors, cases)}"""
    return {
        "rvq_decode": rvq_golden(),
        "scale_attention": scale_attention_golden(),
        "attention_merge": merge_golden(),
        "attention_prepare": prepare_golden(),
        "philox": philox_golden(),
    }


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tensors, cases) in golden().items():
        path = folder / f"{name}.safetensors"
        # One key of metadata only: safetensors does not keep the order of several.
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"cases": json.dumps(cases)})
        size = path.stat().st_size
        print(f"{path.name}: {len(cases)} cases, {size} bytes")
        assert size < LARGEST, f"{path} has {size} bytes, more than {LARGEST}"


if __name__ == "__main__":
    main()
