#!/usr/bin/env python3
"""Compares every op, as the program `op` runs it on a device, with the PyTorch references on the same inputs.

    python compare.py --op path/to/op --device cuda

Cases are random: all dtypes, odd sizes, layouts, both ways of memory access, both kernels. Results must lie within the
stated bound of the f64 reference, and equal the f32-sequential one bit for bit where an op promises that. `--only OP`
leaves the others out, `--jobs N` shares the ops out to N processes. Ends with what each op took and `N passed, N failed`.
"""

import argparse
import concurrent.futures
import itertools
import multiprocessing
import pathlib
import random
import select
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import load_file, save_file

import compare_compression
import compare_events
import compare_keep
import compare_importance
import compare_multi_scale
import compare_trees
import compare_visual
from compare_attention import scale_attention
from compare_rvq_encode import rvq_encode
from compare_verification import draft_sample, row_stats, verify
from nextscale_ref import attention, philox, rvq

DTYPES = {
    "u16": torch.uint16,
    "u32": torch.uint32,
    "i32": torch.int32,
    "i64": torch.int64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


class Program:
    """The executable `op` on one device. One process answers many requests: opening a device takes longer than a case."""

    SECONDS = 120

    def __init__(self, path, device, folder):
        self.path, self.device, self.folder, self.process = path, device, pathlib.Path(folder), None

    def __call__(self, op, inputs, settings, repeat=1):
        """Returns (exit code, output tensors by name, why it failed)."""
        read, written = self.folder / "in.safetensors", self.folder / "out.safetensors"
        written.unlink(missing_ok=True)
        request = [op, "--device", self.device, "--out", str(written), "--repeat", str(repeat)]
        if inputs:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, read)
            request += ["--in", str(read)]
        for key, value in settings.items():
            request += ["--set", f"{key}={value}"]
        code, error = self.ask("\t".join(request))
        # Read into memory of our own: the file is written again by the next call.
        outputs = {k: v.clone() for k, v in load_file(written).items()} if code == 0 else {}
        return code, outputs, error

    def ask(self, request):
        """(exit code, why) of a request; of a process that died or hangs too, which is replaced."""
        if self.process is None:
            self.errors = (self.folder / "stderr.txt").open("w+")
            self.process = subprocess.Popen(
                [self.path, "--requests"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
            )
        try:
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], self.SECONDS)[0]:
                self.close()
                return -1, f"no answer within {self.SECONDS} s"
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            code = self.process.wait()
            self.errors.seek(0)
            error = (self.errors.read().strip().splitlines() or ["no message"])[-1]
            self.close()
            return code or -1, f"the process ended: {error}"
        code, _, error = answer.rstrip("\n").partition("\t")
        if self.device.startswith("cuda") and code == "1":
            # What failed on a device may have left it unusable.
            self.close()
        return int(code), error

    def close(self):
        if self.process:
            self.process.kill()
            self.process.wait()
            self.errors.close()
            self.process = None


def same_bits(a, b):
    """Equality that tells -0 from 0 and knows NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    as_bytes = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*as_bytes)


# Each op: case(program, number, rng) -> (what it was, None or why it failed, worst error as a share of the bound).


def rvq_decode(program, number, rng):
    # Consecutive numbers walk all combinations.
    combinations = list(itertools.product(["narrow", "wide", "auto"], ["f32", "f16", "bf16"], ["f32", "f16", "bf16"],
                                          ["u16", "u32", "i64"]))
    # 38 and their number, 81, have no common divisor, so that a few cases are varied too.
    access, out_t, books_t, codes_t = combinations[number * 38 % len(combinations)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    vec = 16 // DTYPES[books_t].itemsize
    dim = rng.choice([1, 3, 13, 33, 64, 127, rng.randint(1, 300)])
    if access == "wide":
        dim = vec * rng.choice([1, 3, 16, 31, 32, 33, rng.randint(1, 64)])
    batch = rng.choice([None, None, 1, 2, 5])
    rows = rng.choice([0, 1, 1, 2, 7, 8, 9, 31, 65, 257, rng.randint(1, 600)])
    levels = rng.choice([0, 1, 2, 7, 8, 9, 16, 17, rng.randint(1, 33)])
    entries = rng.choice([1, 2, 255, 1024, rng.randint(1, 2048)])
    shared, rows_first = rng.random() < 0.25, rng.random() < 0.3

    shape = ([batch] if batch else []) + ([rows, levels] if rows_first else [levels, rows])
    codes = torch.randint(0, entries, shape, generator=generator)
    null_code = rng.choice([None, None, 0, entries - 1, 65535 if codes_t == "u16" else entries + 7])
    if codes_t == "i64" and rng.random() < 0.3:
        null_code = -1
    if null_code is not None:
        codes = codes.masked_fill(torch.rand(codes.shape, generator=generator) < 0.3, null_code)
    beyond = number % 7 == 3 and codes.numel() > 0
    if beyond:
        at = rng.randrange(codes.numel())
        wild = {"u16": [65534], "u32": [2**32 - 1, 65537], "i64": [-(2**63), -2, 2**63 - 1, 2**32]}[codes_t]
        codes.view(-1)[at] = rng.choice(wild + [entries])
        beyond = codes.view(-1)[at] != null_code  # Also true where there is none.
    # Powers of two over a wide range, so that sums cancel and round; some zeroes of either sign.
    books_shape = [entries, dim] if shared else [levels, entries, dim]
    books = torch.randn(books_shape, generator=generator, dtype=torch.float32)
    books *= 2.0 ** torch.randint(-8, 7, books_shape, generator=generator)
    books *= torch.rand(books_shape, generator=generator) > 0.05
    books = books.to(DTYPES[books_t])

    settings = {"out_dtype": out_t, "access": access, "rows_first": str(rows_first).lower()}
    if null_code is not None:
        settings["null_code"] = null_code
    what = (f"{codes_t} {books_t}->{out_t} {access} codes {'x'.join(map(str, shape))} of {entries}x{dim}"
            f"{' shared' if shared else ''}{' rows_first' if rows_first else ''}"
            f"{f' null {null_code}' if null_code is not None else ''}{' out of range' if beyond else ''}")
    inputs = {"codes": codes.to(DTYPES[codes_t]), "codebooks": books}
    exit_code, outputs, error = program("rvq_decode", inputs, settings, repeat=2 if number % 5 == 0 else 1)

    if beyond and program.device == "host":
        refused = exit_code == 1 and "codes: code " in error
        return what, None if refused else f"not refused: exit code {exit_code} {error}", 0.0
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    # A kernel asks for the null code before it clamps: a code that is clamped onto it is an entry like any other. For
    # the reference the null codes therefore move to where no clamped code is.
    clamped = codes.long().clamp(0, entries - 1)
    codes = clamped if null_code is None else torch.where(codes == null_code, -1, clamped)
    how = {"null_code": None if null_code is None else -1, "rows_first": rows_first}
    out = outputs["out"]
    if not same_bits(out, rvq.rvq_decode(codes, books, DTYPES[out_t], **how)):
        return what, "differs from the f32-sequential reference", 0.0
    difference = (out.double() - rvq.rvq_decode_f64(codes, books, **how)).abs()
    bound = rvq.error_bound(codes, books, DTYPES[out_t], **how)
    if not (difference <= bound).all():
        return what, "outside the bound around the f64 reference", 0.0
    if program.device != "host" and outputs["flags"].tolist() != [int(beyond)]:
        return what, f"flags are {outputs['flags'].tolist()}", 0.0
    share = torch.where(bound > 0, difference / bound, 0).max().item() if out.numel() else 0.0
    return what, None, share


def within(name, out, exact, bound, dtype):
    """(None or why not, worst error as a share of the bound). `bound` is that before rounding to `dtype`."""
    if out.dtype != dtype or out.shape != exact.shape:
        return f"{name} is {out.dtype} {list(out.shape)}", 0.0
    bound = bound + attention.rounding(exact.abs() + bound, dtype)
    # Infinities are equal; a NaN is close to nothing.
    difference = torch.where(out.double() == exact, 0, (out.double() - exact).abs())
    if not (difference <= bound).all():
        return f"{name} is outside the bound around the f64 reference", 0.0
    return None, torch.where(bound > 0, difference / bound, 0).max().item() if out.numel() else 0.0


FLOATS = ["f32", "f16", "bf16"]


def attention_merge(program, number, rng):
    # Consecutive numbers walk all combinations: 10 and their number, 27, have no common divisor.
    combinations = list(itertools.product(["narrow", "wide", "auto"], FLOATS, FLOATS))
    access, out_t, parts_t = combinations[number * 10 % len(combinations)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    vec = 16 // DTYPES[parts_t].itemsize
    dim = rng.choice([1, 3, 33, 64, 127, 128, rng.randint(1, 1024)])
    if access == "wide":
        dim = vec * rng.choice([1, 3, 8, 16, 17, 33])
    parts = rng.choice([1, 2, 3, 4, 5, 8, 9, 17, rng.randint(1, 256)])
    batch, rows, heads = rng.choice([1, 2, 3]), rng.choice([0, 1, 2, 9, 33]), rng.choice([1, 2, 5])
    values = torch.randn([parts, batch, rows, heads, dim], generator=generator).to(DTYPES[parts_t])
    spread = rng.choice([1, 10, 200])
    empty = rng.choice([0, 0, 0.4, 1])

    def random_lse(shape):
        lse = torch.randn(shape, generator=generator) * spread
        return lse.masked_fill(torch.rand(shape, generator=generator) < empty, -torch.inf)

    lse = random_lse([parts, batch, heads, rows])
    # What has no weight may be anything.
    values = values.masked_fill((lse == -torch.inf).transpose(-1, -2)[..., None], torch.nan)
    inputs, old = {"parts": values, "lse": lse}, None
    if rng.random() < 0.4:
        old = (torch.randn([batch, rows, heads, dim], generator=generator).to(DTYPES[out_t]),
               random_lse([batch, heads, rows]))
        inputs |= {"old_out": old[0], "old_lse": old[1]}
    what = (f"{parts_t}->{out_t} {access} {parts} parts of {batch}x{rows}x{heads}x{dim} spread {spread} "
            f"empty {empty}{' accumulated' if old else ''}")
    settings = {"out_dtype": out_t, "access": access}
    exit_code, outputs, error = program("attention_merge", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    out, out_lse, out_bound, lse_bound = attention.merge(values, lse, old)
    problem, share = within("out", outputs["out"], out, out_bound, DTYPES[out_t])
    lse_problem, lse_share = within("out_lse", outputs["out_lse"], out_lse, lse_bound, torch.float32)
    return what, problem or lse_problem, max(share, lse_share)


def attention_prepare(program, number, rng):
    combinations = list(itertools.product(["narrow", "wide", "auto"], FLOATS, FLOATS, FLOATS))
    access, in_t, out_t, cache_t = combinations[number * 38 % len(combinations)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def random_like(shape):
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-3, 4, shape, generator=generator)

    vec = 16 // DTYPES[in_t].itemsize
    rope = rng.choice(["none", "interleaved", "interleaved-full", "half", "half", "half-full"])
    axes = rng.choice([1, 1, 2, 3]) if rope.startswith("half") else 1
    # Every half of an axis is a multiple of this.
    unit = vec if access == "wide" else 1
    most = 256 // (2 * axes * unit)
    rotary = 2 * axes * unit * rng.choice([1, most, rng.randint(1, most), rng.randint(1, most)])
    dim = rotary if rng.random() < 0.5 else rotary + unit * rng.randint(0, (256 - rotary) // unit)
    batch, rows = rng.choice([1, 2, 3]), rng.choice([0, 1, 2, 7, 20])
    heads, kv_heads = rng.choice([1, 2, 5, 8]), rng.choice([1, 2, 3])
    cache_rows = rows + rng.choice([0, 1, 30])
    present = rng.choice(["qkv", "qkv", "qkv", "q", "kv", "v"])
    norm = rng.choice(["none", "l2", "rms"])
    eps = {"none": 0.0, "l2": rng.choice([1e-12, 0.5]), "rms": 1e-6}[norm]
    sizes = {"q": heads, "k": kv_heads, "v": kv_heads}
    tensors = {name: random_like([batch, rows, sizes[name], dim]).to(DTYPES[in_t]) for name in present}
    caches = {f"{name}_cache": random_like([batch, cache_rows, kv_heads, dim]).to(DTYPES[cache_t])
              for name in present if name != "q"}
    inputs, settings = tensors | caches, {"access": access, "out_dtype": out_t, "norm": norm}
    if norm != "none":
        settings["eps"] = eps
    weights = {}
    if norm == "rms" and rng.random() < 0.7:
        weights = {name: random_like([dim]) for name in present if name != "v"}
        inputs |= {f"{name}_weight": weight for name, weight in weights.items()}
    multiplier = random_like([heads]) if "q" in present and rng.random() < 0.5 else None
    if multiplier is not None:
        inputs["q_multiplier"] = multiplier

    beyond = rng.random() < 0.3
    append_at = torch.tensor([rng.randint(0, cache_rows - rows) for _ in range(batch)], dtype=torch.int32)
    if rng.random() < 0.5:
        if beyond:
            append_at[rng.randrange(batch)] = rng.choice([-1, cache_rows - rows + 1, 2**31 - 1, -(2**31)])
        inputs["append_at"] = append_at
    else:
        append_at[:] = append_at[0]
        settings["append_at"] = int(append_at[0])
    token = torch.arange(rows)
    place = append_at.long()[:, None] + token
    flags = 2 * int(present != "q" and bool(((place < 0) | (place >= cache_rows)).any()))
    known = False
    rows_of_table, columns = {}, {}
    if rope != "none":
        table_rows = max(rows, 1) + rng.choice([0, 40])
        columns = rotary if rope.endswith("full") else rotary // 2
        angles = torch.rand([table_rows, columns], generator=generator) * 6.3
        cos, sin = angles.cos(), angles.sin()
        inputs |= {"cos": cos, "sin": sin}
        settings |= {"rope": rope.split("-")[0], "axes": axes, "full_table": str(rope.endswith("full")).lower()}
        kind = rng.choice(["from", "append", "rows", "batch"])
        if kind == "from":
            settings["position"] = rng.randint(0, table_rows - rows)
            position = (settings["position"] + token).expand(batch, rows)
        elif kind == "append":
            settings["position_at_append"] = "true"
            position = place
        else:
            shape = [rows] if kind == "rows" else [batch, rows]
            position = torch.randint(0, table_rows, shape, generator=generator).to(torch.int32)
            if beyond and position.numel():
                position.view(-1)[rng.randrange(position.numel())] = rng.choice([-1, table_rows, 2**31 - 1])
            inputs["positions"] = position
            position = position.long().expand(batch, rows)
        outside = bool(((position < 0) | (position >= table_rows)).any())
        # A number is checked before anything is launched.
        known = outside and kind == "append" and "append_at" not in inputs
        flags += 4 * int(outside and present != "v")
        position = position.clamp(0, table_rows - 1)
        rows_of_table = {"cos": cos[position], "sin": sin[position]}
        beyond = flags > 0 or outside
    else:
        beyond = flags > 0

    what = (f"{in_t}->{out_t},{cache_t} {access} {present} {batch}x{rows}x{heads},{kv_heads}x{dim} {norm} {rope}"
            f"{f' {rotary} in {axes}' if rope != 'none' else ''}{' out of range' if beyond else ''}")
    exit_code, outputs, error = program("attention_prepare", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if known or (beyond and program.device == "host"):
        refused = exit_code == 1 and "rows" in error
        return what, None if refused else f"not refused: exit code {exit_code} {error}", 0.0
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0

    worst = 0.0
    for name, x in tensors.items():
        how = {}
        if name != "v":
            how = dict(norm=norm, eps=eps, weight=weights.get(name), rope=rope, axes=axes) | rows_of_table
        if name == "q":
            how["multiplier"] = multiplier
        exact, bound = attention.prepare(x, **how)
        dtype, key = DTYPES[out_t], "q_out"
        if name != "q":
            dtype, key = DTYPES[cache_t], f"{name}_cache"
            # Rows that were there stay as they are, bit for bit.
            bound = attention.append(torch.zeros(caches[key].shape, dtype=torch.float64), bound, append_at.tolist())
            written = attention.append(torch.zeros(caches[key].shape), torch.ones(x.shape), append_at.tolist())
            untouched = written == 0
            if not same_bits(outputs[key][untouched], caches[key][untouched]):
                return what, f"{key}: rows of others were written", 0.0
            exact = attention.append(caches[key].double(), exact, append_at.tolist())
        problem, share = within(key, outputs[key], exact, bound, dtype)
        if problem:
            return what, problem, 0.0
        worst = max(worst, share)
    if program.device != "host" and outputs["flags"].tolist() != [flags]:
        return what, f"flags are {outputs['flags'].tolist()} instead of {flags}", 0.0
    return what, None, worst


def philox_fill(program, number, rng):
    positions = rng.choice([0, 1, 255, 256, 257, rng.randint(1, 2000)])
    first = rng.choice([0, 2**32 - 3, 2**64 - 5, rng.getrandbits(64)])
    where = dict(seed=rng.getrandbits(64), first_position=first, domain=rng.getrandbits(32), draw=rng.getrandbits(32))
    dtype = ["u32", "f32"][number % 2]
    what = f"{dtype} {positions} positions from {first}"
    settings = dict(positions=positions, dtype=dtype) | where
    exit_code, outputs, error = program("philox_fill", {}, settings, repeat=2 if number % 5 == 0 else 1)
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    want = philox.philox_fill(positions, **where, dtype=DTYPES[dtype])
    return what, None if same_bits(outputs["out"], want) else "differs from the reference", 0.0


OPS = {
    "rvq_decode": rvq_decode,
    "rvq_encode": rvq_encode,
    "scale_attention": scale_attention,
    "attention_merge": attention_merge,
    "attention_prepare": attention_prepare,
    "verify": verify,
    "draft_sample": draft_sample,
    "row_stats": row_stats,
    "philox_fill": philox_fill,
} | compare_multi_scale.OPS | compare_keep.OPS | compare_importance.OPS | compare_trees.OPS | compare_visual.OPS | compare_compression.OPS | compare_events.OPS


# What takes longest, by experience.
SLOW = ["redundancy", "scale_attention", "importance", "multi_scale_encode", "pack", "select", "rvq_encode", "unpack"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", required=True, help="the executable")
    parser.add_argument("--device", default="host", help="what op's --device takes")
    parser.add_argument("--cases", type=int, default=81, help="of each op; 81 cover all dtypes and access modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="only this op; may be repeated")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with ops of its own")
    parser.add_argument("--time-budget", type=float, help="seconds after which an op's cases are left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    listed = subprocess.run([arguments.op, "--list"], capture_output=True, text=True, check=True).stdout
    # An op that this program cannot compare is a failure, or it would be forgotten.
    names = [line.split()[0] for line in listed.splitlines()]
    if unknown := set(arguments.only or []) - set(names):
        parser.error(f"{arguments.op} has no op {', '.join(sorted(unknown))}")
    names = arguments.only or names
    if arguments.jobs > 1:
        # Forked, with all that is imported: each works through ops of its own, those that take longest first.
        names = sorted(names, key=lambda name: name not in SLOW)
        forked = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(min(arguments.jobs, len(names)), forked) as pool:
            results = list(pool.map(compare, names, itertools.repeat(arguments)))
    else:
        results = [compare(name, arguments) for name in names]
    print("seconds by op:", ", ".join(f"{name} {seconds:.0f}" for name, (_, _, seconds) in zip(names, results)))
    passed, failed = (sum(result[i] for result in results) for i in (0, 1))
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


def compare(name, arguments):
    """(passed, failed, seconds) of an op's cases."""
    torch.set_num_threads(1)
    if name not in OPS:
        print(f"FAILED {name}: no comparison is written for it", flush=True)
        return 0, 1, 0.0
    passed, failed, started = 0, 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        program = Program(arguments.op, arguments.device, folder)
        try:
            for number in range(arguments.cases):
                if arguments.time_budget and time.monotonic() - started > arguments.time_budget:
                    print(f"LEFT OUT {name:<18} {number:>4} and later, out of time", flush=True)
                    break
                rng = random.Random(f"{arguments.seed} {name} {number}")
                try:
                    what, problem, share = OPS[name](program, number, rng)
                except Exception as error:  # A case that breaks must not hide the others.
                    what, problem, share = f"case {number}", f"{type(error).__name__}: {error}", 0.0
                passed, failed = passed + (problem is None), failed + (problem is not None)
                verdict = "ok    " if problem is None else "FAILED"
                print(f"{verdict} {name:<18} {number:>4}  {what}  error/bound {share:.2f}"
                      f"{f'  {problem}' if problem else ''}", flush=True)
        finally:
            program.close()
    return passed, failed, time.monotonic() - started


if __name__ == "__main__":
    main()
