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

The same bytes every time: seeds are fixed, and random values are drawn from Philox itself, not from a library whose
generator may change.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file

from nextscale_ref import philox, rvq

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


def main():
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tensors, cases) in {"rvq_decode": rvq_golden(), "philox": philox_golden()}.items():
        path = folder / f"{name}.safetensors"
        # One key of metadata only: safetensors does not keep the order of several.
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"cases": json.dumps(cases)})
        size = path.stat().st_size
        print(f"{path.name}: {len(cases)} cases, {size} bytes")
        assert size < LARGEST, f"{path} has {size} bytes, more than {LARGEST}"


if __name__ == "__main__":
    main()
