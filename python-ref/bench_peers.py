#!/usr/bin/env python3
"""Times what PyTorch offers for each op, on the shapes of benches/shapes.json, and writes peers.json.

    python bench_peers.py --out peers.json

Modes, each a median:
    graph  a CUDA graph of 20 calls (fewer if they take over 4 ms), L2 warm; the time of a replay / calls. After 200 ms of
           rest, as the Rust benches do it: a GPU under load lowers its clock
    eager  20 calls from Python between two events / 20
    cold   one call between two events after 256 MiB were written, which leaves nothing of the inputs in L2; the GPU is
           kept busy until the call is enqueued, so that the time is the GPU's, not Python's

Every peer is checked against the op's reference first, in fresh memory full of NaN, and again after its graph was
replayed. One that fails is recorded with the error in place of a time; packages that are not installed are left out.

peers.json: {"machine": {torch, cuda, gpu, driver, copy_gbps, matmul_bf16_tflops}, "rows": [{op, case, peer, mode, us}
or {op, case, peer, mode, error}]}; `exact` in a row says that the peer's result equals the reference bit for bit.

`--quick` leaves out what is known to be slower than another peer. `--only OP`, `--case` and `--peer` take some (patterns as
of a shell; they may be repeated), `--list` prints what would run. A run ends in time: `--time-budget SECONDS` starts no peer
after that and prints those left out, the quick ones come first; `--peer-limit SECONDS` stops a peer that takes longer, its
compiler included. `--jobs N` lets N processes compile before anything is timed: what takes minutes of one core is then
in the compilers' caches. What they tuned is not: the process that times tunes again, on a GPU of its own.
`--check-only` only checks, on small versions of the shapes, on any device. Ends with what each op took.
"""

import argparse
import collections
import contextlib
import fnmatch
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from nextscale_ref import attention, rvq
from nextscale_ref.dtypes import DTYPES
from peers_attention import ScaleAttention
from peers_common import ALWAYS, BEST, COMPILERS, FULL, Case, compiled
from peers_compression import Pack, PackedAttention
from peers_decode_rules import DecodeRules
from peers_events import CompressEvent
from peers_keep import Compact, Drift, Select
from peers_importance import Importance, Redundancy
from peers_multi_scale import MultiScale
from peers_rvq_encode import RvqEncode
from peers_trees import TreeVerify
from peers_verification import Verify
from peers_visual import VisualVerify

SHAPES = pathlib.Path(__file__).resolve().parent.parent / "benches" / "shapes.json"
CALLS = 20
# A graph of fewer calls, if they would take longer than this.
LONG_GRAPH_MS = 4
# No more of a call than fit in this, but for three: what takes a second is measured well enough by them.
LONG_MS = 200
# Before a graph is timed.
REST_S = 0.2
# Of ops with products or convolutions a compiler chooses kernels by timing them, and keeps the choice with the code.
TUNED = ("rvq_encode", "importance", "redundancy", "multi_scale", "scale_attention", "pack")


class Expressions(Case):
    """What ops have in common whose peers are expressions."""

    @staticmethod
    def smaller(case):
        """A version of a case for checking only."""
        most = {"rows": 33, "batch": 3, "entries": 100, "cache_rows": 99, "append_at": 7}
        return case | {size: min(case[size], most[size]) for size in most if size in case}


# ---- rvq_decode


class RvqDecode(Expressions):
    """Inputs of one case and the expressions that compute it."""

    def __init__(self, case, device):
        self.levels, self.dim = case["levels"], case["dim"]
        self.out_dtype = DTYPES[case["out"]]
        self.shared = case["shared"]
        self.rows_first = case["codes_layout"] == "batch_rows_levels"
        generator = torch.Generator(device).manual_seed(0)
        inner = [case["rows"], self.levels] if self.rows_first else [self.levels, case["rows"]]
        # Without a batch the expressions are simpler and no slower.
        shape = ([case["batch"]] if case["batch"] > 1 else []) + inner
        self.codes = torch.randint(0, case["entries"], shape, generator=generator, device=device)
        books = [case["entries"], self.dim] if self.shared else [self.levels, case["entries"], self.dim]
        self.books = torch.randn(books, generator=generator, device=device).to(DTYPES[case["codebooks"]])
        self.flat = self.books.view(-1, self.dim)
        self.offsets = torch.arange(self.levels, device=device)[:, None] * (0 if self.shared else case["entries"])
        # PyTorch indexes with i32 and i64: i64 codes as they are, narrower ones as whichever is faster.
        self.indices = ["i64"] if case["codes"] == "i64" else ["i32", "i64"]

    def reference(self):
        """The result, and how far a peer may be from it: it may add in another order, in the dtype of its inputs."""
        want = rvq.rvq_decode(self.codes, self.books, self.out_dtype, rows_first=self.rows_first)
        magnitude = rvq.rvq_decode(self.codes, self.books.abs(), torch.float32, rows_first=self.rows_first)
        epsilon = max(torch.finfo(self.books.dtype).eps, torch.finfo(self.out_dtype).eps)
        return want, magnitude * (self.levels * epsilon)

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call).

        Making is lazy: compiling takes long and may fail.
        """
        for index in self.indices:
            yield f"embedding per level, summed ({index})", ALWAYS, lambda i=index: self.call(self.embedding_sum, i)
            yield f"gather and sum ({index})", ALWAYS, lambda i=index: self.call(self.gather_sum, i)
            yield f"embedding_bag ({index})", ALWAYS, lambda i=index: self.call(self.embedding_bag, i)
            yield f"embedding_bag, flat indices given ({index})", ALWAYS, lambda i=index: self.prepared_bag(i)
        for mode, name, when in COMPILERS:
            for expression, what, when in [
                (self.embedding_sum, "embedding per level, summed", FULL),
                (self.gather_sum, "gather and sum", when),
            ]:
                yield (
                    f"{name}: {what} ({self.indices[0]})",
                    when,
                    lambda e=expression, m=mode: self.call(e, self.indices[0], m),
                )

    def call(self, expression, index, compile_mode=None):
        dtype = {"i32": torch.int32, "i64": torch.int64}[index]
        codes, offsets = self.codes.to(dtype), self.offsets.to(dtype)
        if compile_mode:
            expression = compiled(expression, compile_mode)
        return lambda: expression(codes, offsets, self.books, self.flat)

    def levels_first(self, codes):
        return codes.transpose(-1, -2) if self.rows_first else codes

    def embedding_sum(self, codes, offsets, books, flat):
        codes = self.levels_first(codes)
        total = F.embedding(codes[..., 0, :], books if self.shared else books[0])
        for level in range(1, self.levels):
            total += F.embedding(codes[..., level, :], books if self.shared else books[level])
        return total.to(self.out_dtype)

    def gather_sum(self, codes, offsets, books, flat):
        codes = self.levels_first(codes)
        return flat[codes if self.shared else codes + offsets].sum(-3).to(self.out_dtype)

    def embedding_bag(self, codes, offsets, books, flat):
        codes = self.levels_first(codes)
        bags = (codes if self.shared else codes + offsets).transpose(-1, -2)
        out = F.embedding_bag(bags.reshape(-1, self.levels), flat, mode="sum")
        return out.view(*bags.shape[:-1], self.dim).to(self.out_dtype)

    def prepared_bag(self, index):
        dtype = {"i32": torch.int32, "i64": torch.int64}[index]
        bags = (self.levels_first(self.codes) + self.offsets).transpose(-1, -2).to(dtype)
        shape, bags = bags.shape[:-1], bags.reshape(-1, self.levels).contiguous()
        return lambda: F.embedding_bag(bags, self.flat, mode="sum").view(*shape, self.dim).to(self.out_dtype)


# ---- attention_merge


class AttentionMerge(Expressions):
    """Inputs of one case and the expressions that compute it."""

    def __init__(self, case, device):
        self.accumulate, self.out_dtype = case["accumulate"], DTYPES[case["out"]]
        generator = torch.Generator(device).manual_seed(0)
        shape = [case["batch"], case["rows"], case["heads"], case["dim"]]
        rows = [case["batch"], case["heads"], case["rows"]]

        def random(shape):
            return torch.randn(shape, generator=generator, device=device)

        self.parts, self.lse = random([case["parts"], *shape]).to(DTYPES[case["in"]]), random([case["parts"], *rows])
        self.old = (random(shape).to(self.out_dtype), random(rows)) if self.accumulate else None

    def reference(self):
        out, lse, bound, lse_bound = attention.merge(self.parts, self.lse, self.old)
        epsilon = max(torch.finfo(self.parts.dtype).eps, torch.finfo(self.out_dtype).eps)
        # A peer may compute in the dtype of its inputs.
        magnitude = self.parts.double().abs().amax(0) + (self.old[0].double().abs() if self.old else 0)
        return (out.to(self.out_dtype), lse.float()), (bound + 8 * epsilon * magnitude, lse_bound + 1e-5)

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        if self.accumulate:
            # As ring attention's users write it.
            expression, what, arguments = self.update, "sigmoid update", (self.parts[0], self.lse[0], *self.old)
        else:
            expression, what, arguments = self.weighted, "softmax and sum", (self.parts, self.lse)
        yield what, ALWAYS, lambda: lambda: expression(*arguments)
        for mode, name, when in COMPILERS:
            yield f"{name}: {what}", when, lambda m=mode: self.call(expression, m, *arguments)

    def call(self, expression, mode, *arguments):
        expression = compiled(expression, mode)
        return lambda: expression(*arguments)

    def weighted(self, parts, lse):
        weights = lse.softmax(0).transpose(-1, -2)[..., None]
        return (weights * parts).sum(0).to(self.out_dtype), lse.logsumexp(0)

    def update(self, part, part_lse, out, lse):
        share = torch.sigmoid(part_lse - lse).transpose(-1, -2)[..., None]
        merged = out + share * (part.float() - out.float())
        return merged.to(self.out_dtype), lse - F.logsigmoid(lse - part_lse)


# ---- attention_prepare


class AttentionPrepare(Expressions):
    """Inputs of one case, views of one packed projection, and the expressions that models write."""

    def __init__(self, case, device):
        self.case, self.out_dtype = case, DTYPES[case["out"]]
        self.norm, self.rope = case["norm"], case["rope"]
        generator = torch.Generator(device).manual_seed(0)
        batch, rows, dim, kv_heads = case["batch"], case["rows"], case["dim"], case["kv_heads"]
        self.at, self.rows = case["append_at"], rows

        def random(shape):
            return torch.randn(shape, generator=generator, device=device)

        heads = [case["heads"], kv_heads, kv_heads]
        packed = random([batch, rows, sum(heads), dim]).to(DTYPES[case["in"]])
        self.qkv = packed.split(heads, 2)
        self.caches = random([2, batch, case["cache_rows"], kv_heads, dim]).to(self.out_dtype)
        self.weights = random([2, dim]) if self.norm == "rms" else None
        self.multiplier = random([case["heads"], 1]).exp() if self.norm == "l2" else None
        self.table = None
        if self.rope != "none":
            angles = random([case["cache_rows"], dim if case["full_table"] else dim // 2])[self.at : self.at + rows]
            self.table = torch.stack([angles.cos(), angles.sin()])

    def reference(self):
        how = dict(norm=self.norm, eps={"l2": 1e-12, "rms": 1e-6}.get(self.norm, 0))
        if self.table is not None:
            how["rope"] = self.rope + ("-full" if self.case["full_table"] else "")
            how["cos"], how["sin"] = self.table
        weights = [None, None] if self.weights is None else self.weights
        multiplier = None if self.multiplier is None else self.multiplier[:, 0]
        q, k, v = self.qkv
        exact = [
            attention.prepare(q, weight=weights[0], multiplier=multiplier, **how),
            attention.prepare(k, weight=weights[1], **how),
            attention.prepare(v),
        ]
        # A peer may round to the dtype of its inputs after each step.
        epsilon = max(torch.finfo(q.dtype).eps, torch.finfo(self.out_dtype).eps)
        return tuple(x.to(self.out_dtype) for x, _ in exact), tuple((b * 2**19 + 1e-6) * 8 * epsilon for _, b in exact)

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call).

        All return the new rows, queries first.
        """
        arguments = (*self.qkv, *self.caches, self.weights, self.multiplier, self.table)
        yield "as written, concatenated", ALWAYS, lambda: lambda: self.concatenated(*arguments)
        yield "as written, copied into a cache", ALWAYS, lambda: lambda: self.copied(*arguments)
        for mode, name, when in COMPILERS:
            for expression, what in [(self.concatenated, "concatenated"), (self.copied, "copied into a cache")]:
                yield f"{name}: {what}", when, lambda e=expression, m=mode: self.call(e, m, arguments)

    def call(self, expression, mode, arguments):
        expression = compiled(expression, mode)
        return lambda: expression(*arguments)

    def turn(self, x, table):
        cos, sin = table[:, :, None]
        x = x.float()
        if self.rope == "interleaved":
            even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
            return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)
        if not self.case["full_table"]:
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def steps(self, q, k, v, weights, multiplier, table):
        if self.norm == "l2":
            q = F.normalize(q.float(), dim=-1) * multiplier
            k = F.normalize(k.float(), dim=-1)
        elif self.norm == "rms":
            q, k = (F.rms_norm(x.float(), x.shape[-1:], weight, 1e-6) for x, weight in zip((q, k), weights))
        if table is not None:
            q, k = self.turn(q, table), self.turn(k, table)
        return (x.to(self.out_dtype) for x in (q, k, v))

    def concatenated(self, q, k, v, k_cache, v_cache, weights, multiplier, table):
        q, k, v = self.steps(q, k, v, weights, multiplier, table)
        k, v = torch.cat([k_cache[:, : self.at], k], 1), torch.cat([v_cache[:, : self.at], v], 1)
        return q, k[:, self.at :], v[:, self.at :]

    def copied(self, q, k, v, k_cache, v_cache, weights, multiplier, table):
        q, k, v = self.steps(q, k, v, weights, multiplier, table)
        new = slice(self.at, self.at + self.rows)
        k_cache[:, new].copy_(k)
        v_cache[:, new].copy_(v)
        return q, k_cache[:, new], v_cache[:, new]


OPS = {
    "rvq_decode": RvqDecode,
    "rvq_encode": RvqEncode,
    "scale_attention": ScaleAttention,
    "attention_merge": AttentionMerge,
    "attention_prepare": AttentionPrepare,
    "multi_scale": MultiScale,
    "verify": Verify,
    "drift": Drift,
    "select": Select,
    "compact": Compact,
    "compress_event": CompressEvent,
    "tree_verify": TreeVerify,
    "importance": Importance,
    "redundancy": Redundancy,
    "visual_verify": VisualVerify,
    "decode_rules": DecodeRules,
    "pack": Pack,
    "packed_attention": PackedAttention,
}


# ---- checking and timing


def tensors(result):
    """A result as a tuple of tensors."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def check(results, wanted, tolerances):
    """Whether the results equal the wanted ones in every bit. Raises if they are not even close."""
    results, wanted = tensors(results), tensors(wanted)
    if len(results) != len(wanted):
        raise AssertionError(f"wrong result: {len(results)} tensors")
    return all([check_one(*three) for three in zip(results, wanted, tensors(tolerances))])


def check_one(out, want, tolerance):
    if out.shape != want.shape or out.dtype != want.dtype:
        raise AssertionError(f"wrong result: {out.dtype} {list(out.shape)}")
    # Written so that a NaN fails.
    close = (out.float() - want.float()).abs() <= tolerance
    if not close.all():
        raise AssertionError(f"wrong result: {(~close).sum().item()} of {close.numel()} elements are off")
    return torch.equal(out, want)


def poison(like):
    """Memory that a call may get for its output holds NaN afterwards."""
    for tensor in tensors(like):
        torch.full_like(tensor, nothing(tensor))


def nothing(tensor):
    """What no result is."""
    return float("nan") if tensor.is_floating_point() else -1


def milliseconds(work):
    """GPU time of what `work` enqueues."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def median_us(work):
    """Median GPU time of the rounds that fit in 100 ms, at least 7 (3, if they are long), after 25 ms of them."""
    once = max(milliseconds(work), 1e-3)
    if once < 25:
        for _ in range(int(25 / once)):
            work()
    rounds = min(200, max(7 if once < LONG_MS else 3, int(100 / once)))
    return statistics.median(milliseconds(work) for _ in range(rounds)) * 1e3


def time_graph(call, verify):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    once = milliseconds(call)
    calls = max(1, min(CALLS, int(LONG_GRAPH_MS / max(once, 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            out = call()
    for tensor in tensors(out):
        tensor.fill_(nothing(tensor))
    graph.replay()
    verify(out)
    torch.cuda.synchronize()
    time.sleep(REST_S)
    return median_us(graph.replay) / calls


def time_eager(call, verify):
    count = max(1, min(CALLS, int(LONG_MS / max(milliseconds(call), 1e-3))))

    def calls():
        for _ in range(count):
            call()

    return median_us(calls) / count


def time_cold(call, verify):
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    count = max(3, min(30, int(LONG_MS / max(milliseconds(call), 1e-3))))
    times = []
    for number in range(count):
        flush.fill_(number)
        torch.cuda._sleep(1_000_000)  # About half a millisecond.
        times.append(milliseconds(call))
    return statistics.median(times) * 1e3


TIMERS = {"graph": time_graph, "eager": time_eager, "cold": time_cold}


class Late(Exception):
    """A peer took too long."""


@contextlib.contextmanager
def limited(seconds):
    """Raises Late in what takes longer, as soon as Python is back from what it waits for."""

    def late(*_):
        raise Late(f"not done in {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(make, verify, like, modes, limit=None):
    """Yields (mode, result) of one peer, the result as it stands in a row. Survives what the peer may raise."""
    started = time.monotonic()
    try:
        with limited(limit):
            call = make()
            call()  # Compiles what is compiled at the first call.
            poison(like)
            exact = verify(call())
    except Exception as error:
        for mode in modes or [None]:
            yield mode, {"error": brief(error)}
        return
    for mode in modes:
        left = limit and max(1.0, limit - (time.monotonic() - started))
        try:
            with limited(left):
                us = TIMERS[mode](call, verify)
            yield mode, {"us": round(us, 3), "exact": exact}
        except Exception as error:
            yield mode, {"error": brief(error)}
    if not modes:
        yield None, {"exact": exact}


def compiler_caches(op, peer, jobs):
    """Code may come from a cache, but nothing that was found out by timing while others used the GPU."""
    if not jobs:
        return
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    tuned = op in TUNED and "max-autotune" in peer
    for config, name, value in [
        (inductor, "autotune_local_cache", False),
        (inductor, "fx_graph_cache", not tuned),
        (functorch, "enable_autograd_cache", not tuned),
    ]:
        # Of another version it may have another name; then that cache is as it is.
        if hasattr(config, name):
            setattr(config, name, value)


def compile_some(work, device, part, parts, limit):
    """Calls each of some peers once: compilers leave what they made in their caches."""
    made = failed = 0
    for number, (op, name, case, peer) in enumerate(work):
        if number % parts != part:
            continue
        try:
            with limited(limit):
                compiler_caches(op, peer, parts)
                inputs = OPS[op](case, device)
                next(make for found, _, make in inputs.peers() if found == peer)()()
            made += 1
        except Exception as error:  # It fails again where it counts.
            print(f"compiling {name}: {peer}: {brief(error)}", flush=True)
            failed += 1
        inputs = None
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    return made, failed


def compile_all(jobs, limit):
    """Other processes, each with a part of what is to be compiled, until all are done or `limit` is over."""
    started = time.monotonic()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *sys.argv, "--compile-part"]
    workers = [subprocess.Popen([*command, f"{part}/{jobs}"], env=environment) for part in range(jobs)]
    for worker in workers:
        try:
            worker.wait(max(0.1, limit - (time.monotonic() - started)) if limit else None)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    print(f"compiled by {jobs} processes in {time.monotonic() - started:.0f} s", flush=True)


def brief(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def copy_gbps():
    """Bytes read and written per second by a large copy within the device, in GB/s."""
    source = torch.zeros(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(milliseconds(lambda: target.copy_(source)) for _ in range(15)) / 1e3
    return round(2 * source.numel() / seconds / 1e9, 1)


def matmul_bf16_tflops():
    """The rate of the largest dense product that PyTorch does, in TFLOP/s."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return round(2 * size**3 / median_us(lambda: torch.matmul(a, b, out=out)) / 1e6, 1)


def driver():
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def is_compiled(peer):
    return peer.startswith(("compile", "flex"))


def matches(name, patterns):
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=pathlib.Path, default=SHAPES)
    parser.add_argument("--out", type=pathlib.Path, help="peers.json")
    parser.add_argument("--only", "--op", action="append", choices=OPS, help="only this op; may be repeated")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="only these cases; may be repeated")
    parser.add_argument("--peer", action="append", metavar="PATTERN", help="only these peers; may be repeated")
    parser.add_argument("--quick", action="store_true", help="only peers that may be the best")
    parser.add_argument("--mode", action="append", choices=TIMERS, help="only this mode; may be repeated")
    parser.add_argument("--time-budget", type=float, help="seconds after which no peer is started")
    parser.add_argument("--peer-limit", type=float, default=90, help="seconds for a peer in all its modes; 90")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile before anything is timed")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="print what would run")
    parser.add_argument("--check-only", action="store_true")
    parser.add_argument("--device", default="cuda", help="for --check-only")
    arguments = parser.parse_args()
    checking = arguments.check_only or arguments.list
    if not checking and arguments.out is None:
        parser.error("--out is missing")
    device = ("cpu" if arguments.list else arguments.device) if checking else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_peers.py: PyTorch sees no CUDA device")
    started = time.monotonic()

    def over():
        return arguments.time_budget and time.monotonic() - started > arguments.time_budget

    def wanted(peer):
        return matches(peer, arguments.peer) and not (arguments.no_compile and is_compiled(peer))

    shapes = json.loads(arguments.shapes.read_text())
    cases = [
        (op, name, OPS[op].smaller(case) if checking and case is not None else case)
        for op in arguments.only or OPS
        for shape in shapes[op]
        for name, case in OPS[op].cases(shape)
        if matches(name, arguments.case) or matches(shape["name"], arguments.case)
    ]
    cases = [(op, name, case) for op, name, case in cases if case is not None]
    ranks = [ALWAYS, BEST] if arguments.quick else [ALWAYS, BEST, FULL]
    if arguments.list or arguments.compile_part or arguments.jobs:
        # What a case's peers are called, its small version tells, where there is one.
        small = [(op, name, case, (None if checking else OPS[op].smaller(case)) or case) for op, name, case in cases]
        listed = [
            (op, name, case, peer)
            for rank in ranks
            for op, name, case, smaller in small
            for peer, its_rank, _ in OPS[op](smaller, device).peers()
            if its_rank == rank and wanted(peer)
        ]
        if arguments.list:
            for op, name, _, peer in listed:
                print(f"{op:<18}{name:<44}{peer}")
            counts = collections.Counter(op for op, *_ in listed)
            return print(f"{len(listed)} peers: {', '.join(f'{op} {count}' for op, count in counts.items())}")
        if arguments.compile_part:
            part, parts = map(int, arguments.compile_part.split("/"))
            work = [one for one in listed if is_compiled(one[3])]
            made, failed = compile_some(work, device, part, parts, arguments.peer_limit)
            return print(f"process {part}: {made} compiled, {failed} failed", flush=True)
        # A third of the time, if there is an end to it.
        compile_all(arguments.jobs, arguments.time_budget and arguments.time_budget / 3)

    machine = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if not checking:
        machine |= {"gpu": torch.cuda.get_device_name(), "driver": driver(), "copy_gbps": copy_gbps()}
        machine |= {"matmul_bf16_tflops": matmul_bf16_tflops()}
    print(machine, flush=True)
    rows, failed, left_out, took = [], 0, [], collections.Counter()
    # Without an end in time each case is made once.
    passes = [[rank] for rank in ranks] if arguments.time_budget else [ranks]
    for of_pass in passes:
        for op, name, case in cases:
            begun = time.monotonic()
            try:
                inputs = OPS[op](case, device)
                peers = [(peer, make) for peer, rank, make in inputs.peers() if rank in of_pass and wanted(peer)]
                if not peers:
                    continue
                if over():
                    left_out += [f"{name}: {peer}" for peer, _ in peers]
                    continue
                want, tolerance = inputs.reference()
            except Exception as error:
                # Its peers cannot be checked: a mistake of ours, but no reason to lose the others.
                failed += 1
                rows.append({"op": op, "case": name, "peer": "reference", "mode": None, "error": brief(error)})
                print(f"{name:<28}{'check':<7}{'reference':<60}{brief(error)}", flush=True)
                continue
            made = time.monotonic() - begun
            if made > 2:
                print(f"{name:<28}{'':<7}inputs and reference took {made:.1f} s", flush=True)
            verify = lambda out: check(inputs.result(out), want, tolerance)
            for peer, make in peers:
                if over():
                    left_out.append(f"{name}: {peer}")
                    continue
                modes = [mode for mode in OPS[op].MODES if not arguments.mode or mode in arguments.mode]
                if "on the CPU" in peer:
                    # No graph holds that, and a capture that failed would trouble what comes after.
                    modes = [mode for mode in modes if mode != "graph"]
                compiler_caches(op, peer, arguments.jobs)
                for mode, result in measure(make, verify, want, [] if checking else modes, arguments.peer_limit):
                    failed += "error" in result
                    rows.append({"op": op, "case": name, "peer": peer, "mode": mode} | result)
                    value = result.get("error") or f"{result.get('us', '')} {'exact' if result['exact'] else ''}"
                    print(f"{name:<28}{mode or 'check':<7}{peer:<60}{value}", flush=True)
                if device == "cuda":
                    torch.cuda.empty_cache()
            took[op] += time.monotonic() - begun
            if arguments.out:
                # After every case, so that what was measured outlives a run that is cut off.
                arguments.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    for what in left_out:
        print(f"LEFT OUT, out of time: {what}")
    print("seconds by op:", ", ".join(f"{op} {seconds:.0f}" for op, seconds in took.most_common()))
    print(f"{len(rows)} results, {failed} of them errors, {len(left_out)} left out, {time.monotonic() - started:.0f} s")
    sys.exit(checking and failed > 0)


if __name__ == "__main__":
    main()
