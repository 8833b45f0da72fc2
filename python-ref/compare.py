#!/usr/bin/env python3
"""Compares every op, as the program `op` runs it on a device, with the PyTorch references on the same inputs.

    python compare.py --op path/to/op --device cuda

Cases are random: all dtypes, odd sizes, layouts, both ways of memory access, both kernels. Results must equal the
f32-sequential reference bit for bit where an op promises bits, and lie within the stated bound of the f64 reference.
`--only OP` leaves the others out. Ends with `N passed, N failed`.
"""

import argparse
import itertools
import pathlib
import random
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file

from compare_attention import scale_attention
from nextscale_ref import philox, rvq

DTYPES = {
    "u16": torch.uint16,
    "u32": torch.uint32,
    "i64": torch.int64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


class Program:
    """The executable `op` on one device."""

    def __init__(self, path, device, folder):
        self.path, self.device, self.folder = path, device, pathlib.Path(folder)

    def __call__(self, op, inputs, settings, repeat=1):
        """Returns (exit code, output tensors by name, last line of stderr)."""
        read, written = self.folder / "in.safetensors", self.folder / "out.safetensors"
        written.unlink(missing_ok=True)
        command = [self.path, op, "--device", self.device, "--out", written, "--repeat", str(repeat)]
        if inputs:
            save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, read)
            command += ["--in", read]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        error = (done.stderr.strip().splitlines() or [""])[-1]
        # Read into memory of our own: the file is written again by the next call.
        outputs = {k: v.clone() for k, v in load_file(written).items()} if done.returncode == 0 else {}
        return done.returncode, outputs, error


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


OPS = {"rvq_decode": rvq_decode, "scale_attention": scale_attention, "philox_fill": philox_fill}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", required=True, help="the executable")
    parser.add_argument("--device", default="host", help="what op's --device takes")
    parser.add_argument("--cases", type=int, default=81, help="of each op; 81 cover all dtypes and access modes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="only this op; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        program = Program(arguments.op, arguments.device, folder)
        listed = subprocess.run([arguments.op, "--list"], capture_output=True, text=True, check=True).stdout
        # An op that this program cannot compare is a failure, or it would be forgotten.
        names = [line.split()[0] for line in listed.splitlines()]
        if unknown := set(arguments.only or []) - set(names):
            parser.error(f"{arguments.op} has no op {', '.join(sorted(unknown))}")
        passed = failed = 0
        for name in arguments.only or names:
            if name not in OPS:
                print(f"FAILED {name}: no comparison is written for it")
                failed += 1
                continue
            for number in range(arguments.cases):
                rng = random.Random(f"{arguments.seed} {name} {number}")
                try:
                    what, problem, share = OPS[name](program, number, rng)
                except Exception as error:  # A case that breaks must not hide the others.
                    what, problem, share = f"case {number}", f"{type(error).__name__}: {error}", 0.0
                passed, failed = passed + (problem is None), failed + (problem is not None)
                verdict = "ok    " if problem is None else "FAILED"
                print(f"{verdict} {name:<16} {number:>4}  {what}  error/bound {share:.2f}"
                      f"{f'  {problem}' if problem else ''}", flush=True)
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
