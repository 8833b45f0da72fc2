"""Random cases of scale attention for compare.py: layouts, tables, dims, gathers, lengths, poison, both kernels."""

import torch

from nextscale_ref import scale_attention as reference
from nextscale_ref.dtypes import DTYPES

DIMS = [64, 128, 96, 40, 64, 8, 120, 72]
VARIANTS = ["hopper", "portable", "auto"]
# |difference| of the log-sum-exps of 16-bit inputs.
LSE_BOUND = 2e-4


class Case:
    """Inputs of one call, as tensors and settings of `op`, and what must come out."""

    def __init__(self, device, number, rng):
        self.rng, self.kernel = rng, device != "host"
        # The emulator takes milliseconds for what a GPU does in microseconds.
        self.most_rows = 150 if device == "emulated" else 400
        self.generator = torch.Generator().manual_seed(rng.getrandbits(63))
        self.dtype = ["bf16", "f16"][number % 2] if self.kernel else ["bf16", "f16", "f32"][number % 3]
        self.dim = DIMS[number % len(DIMS)]
        self.batch = rng.choice([1, 1, 2, 3])
        self.kv_heads = rng.choice([1, 1, 2, 3])
        self.heads = self.kv_heads * rng.choice([1, 1, 1, 2, 4])
        self.heads_first = rng.random() < 0.3
        self.settings = {"heads_first": str(self.heads_first).lower()}
        self.choose_kernel(number)
        self.choose_segments()
        self.choose_lengths()
        self.choose_rows()
        self.draw()

    def choose_kernel(self, number):
        rng, settings = self.rng, self.settings
        self.pack = rng.choice([None, None, "true", "false"])
        if self.pack:
            settings["pack"] = self.pack
        if not self.kernel:
            return
        settings["variant"] = VARIANTS[number // 2 % len(VARIANTS)]
        if settings["variant"] == "hopper" and rng.random() < 0.7:
            settings["groups"] = rng.randint(1, 3 if self.dim <= 64 else 2)
        if rng.random() < 0.5:
            settings["splits"] = rng.choice([1, 2, 3, 7])

    # ---- who sees whom

    def grids(self, count, most):
        """Segments of at most `most` tokens together; some are empty."""
        rng, segments = self.rng, []
        for _ in range(count):
            kind = rng.random()
            if kind < 0.15:
                grid = [1, 1, rng.randint(0, 70)]
            elif kind < 0.3:
                grid = [rng.randint(1, 4), rng.randint(1, 6), rng.randint(1, 6)]
            elif kind < 0.4:
                # Around the edges of tiles and chunks.
                grid = [1, 1, rng.choice([1, 63, 64, 65, 127, 128, 129, 192])]
            else:
                grid = [1, rng.randint(1, 13), rng.randint(1, 13)]
            if grid[0] * grid[1] * grid[2] <= most:
                segments.append(grid)
                most -= grid[0] * grid[1] * grid[2]
        return segments or [[1, 1, 1]]

    def choose_segments(self):
        rng = self.rng
        self.windows = []
        # Several batch entries, each with keys of its own length, one after the other in memory.
        self.packed = rng.random() < 0.12
        self.kind = "packed" if self.packed else rng.choice(["causal", "diag", "step", "table", "table", "table"])
        queries = self.grids(rng.randint(1, 8), self.most_rows)
        if self.packed:
            keys, rule = [[1, 1, rng.randint(1, 200)]], lambda q, k: reference.FULL
        elif self.kind == "causal":
            keys, rule = queries, lambda q, k: reference.FULL if k <= q else reference.HIDDEN
        elif self.kind == "diag":
            keys, rule = queries, lambda q, k: reference.FULL if k == q else reference.HIDDEN
        elif self.kind == "step":
            keys, queries, rule = queries, queries[-1:], lambda q, k: reference.FULL
        else:
            keys = queries if rng.random() < 0.6 else self.grids(rng.randint(1, 8), self.most_rows)
            for _ in range(rng.randint(1, 3)):
                self.windows.append([rng.randint(0, 2), rng.randint(0, 4), rng.randint(0, 4)])
            rule = lambda q, k: self.any_rule(queries[q], keys[k])
        self.queries, self.keys = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
        table = [[rule(q, k) for k in range(len(keys))] for q in range(len(queries))]
        self.rules = torch.tensor(table, dtype=torch.int32)
        windows = torch.tensor(self.windows, dtype=torch.int32).reshape(-1, 3)
        self.inputs = {"segments_q": self.queries, "rules": self.rules}
        if not torch.equal(self.queries, self.keys) or rng.random() < 0.5:
            self.inputs["segments_k"] = self.keys
        if self.windows:
            self.inputs["windows"] = windows
        self.seen = reference.visible(self.queries, self.keys, self.rules, windows)

    def any_rule(self, queries, keys):
        rules = [reference.HIDDEN, reference.HIDDEN, reference.FULL, reference.FULL, reference.CAUSAL]
        rules += [reference.WINDOWS + self.rng.randrange(len(self.windows))] * 2
        if queries == keys:
            rules += [reference.COLUMN] * 2
        return self.rng.choice(rules)

    # ---- what there is

    def choose_lengths(self):
        rng = self.rng
        sizes = self.keys.prod(1).tolist()
        self.lengths = self.there = None
        if not self.packed and rng.random() < 0.7:
            return
        index, most = [], []
        for size in sizes:
            if not self.packed and rng.random() < 0.4:
                index.append(-1)
            elif most and rng.random() < 0.2:
                index.append(rng.randrange(len(most)))
                most[index[-1]] = min(most[index[-1]], size)
            else:
                index.append(len(most))
                most.append(size)
        if not most:
            return
        index = torch.tensor(index, dtype=torch.int32)
        draw = lambda size: rng.choice([0, size, rng.randint(0, size)])
        shape = len(most), self.batch, self.kv_heads
        lengths = [[[draw(size) for _ in range(self.kv_heads)] for _ in range(self.batch)] for size in most]
        self.lengths = torch.tensor(lengths, dtype=torch.int32).reshape(shape)
        if self.packed:
            # Its keys are where they are for every head.
            self.lengths = self.lengths[:, :, :1].expand(shape).contiguous()
        self.inputs |= {"segment_lengths": index, "lengths": self.lengths}
        self.there = reference.exists(self.keys, index, self.lengths)

    def choose_rows(self):
        rng, rows = self.rng, len(self.seen)
        self.row_index = None
        self.q_rows = rows
        if rows and rng.random() < 0.25:
            self.q_rows = rng.randint(1, 2 * rows)
            index = torch.randint(0, self.q_rows, [self.batch, rows], generator=self.generator)
            self.row_index = self.inputs["row_index"] = index.to(torch.int32)
        self.kv_offset, self.kv_batch = None, self.batch
        self.kv_rows = self.seen.shape[1] + rng.choice([0, 0, 1, 100])
        if self.packed:
            lengths = self.lengths[0, :, 0].long()
            start = lengths.cumsum(0) - lengths + rng.choice([0, 3])
            self.kv_batch, self.kv_rows = 1, int((start + lengths).max()) + rng.choice([0, 5])
            self.kv_offset = self.inputs["kv_offset"] = start.to(torch.int32)

    # ---- values

    def draw(self):
        rng, dtype = self.rng, DTYPES[self.dtype]
        normal = lambda *shape: torch.randn(shape, generator=self.generator)
        q = normal(self.batch, self.q_rows, self.heads, self.dim)
        k = normal(self.kv_batch, self.kv_rows, self.kv_heads, self.dim)
        v = normal(self.kv_batch, self.kv_rows, self.kv_heads, self.dim)
        # As the library holds it: in f32.
        self.scale = default = (1 / torch.tensor(float(self.dim)).double().sqrt().float()).item()
        normalised = rng.random() < 0.3
        if normalised:
            # VAR and Infinity: l2-normed, with a multiplier for each head.
            q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
            q *= torch.exp(torch.rand([self.heads, 1], generator=self.generator) * 3.4)
            self.scale = 1.0
        elif rng.random() < 0.3:
            self.scale = rng.choice([0.03125, 0.5, 1.0])
        if self.scale != default or rng.random() < 0.2:
            self.settings["scale"] = self.scale
        self.q, self.k, self.v = (x.to(dtype) for x in (q, k, v))
        if normalised and self.dtype != "f16" and rng.random() < 0.6:
            # The norms after rounding; by Cauchy and Schwarz no logit is larger.
            norms = [x.double().norm(dim=-1).max().item() if x.numel() else 0 for x in (self.q, self.k)]
            if 0 < norms[0] * norms[1] < 40:
                self.settings["logit_bound"] = min(40.0, norms[0] * norms[1] * 1.001)
        self.poison()
        swap = (lambda x: x.transpose(1, 2)) if self.heads_first else (lambda x: x)
        self.inputs |= {name: swap(x).contiguous() for name, x in [("q", self.q), ("k", self.k), ("v", self.v)]}

    def poison(self):
        """NaN and infinity wherever nothing may be read, or what is read may not count."""
        used = reference.read(self.k.shape, self.batch, self.seen, self.there, self.kv_offset)
        bad = self.rng.choice([torch.nan, torch.inf, -torch.inf])
        for x in (self.k, self.v):
            x.masked_fill_(~used[..., None], bad)
        if self.row_index is not None:
            for b in range(self.batch):
                unread = torch.ones(self.q_rows, dtype=torch.bool)
                unread[self.row_index[b].long()] = False
                self.q[b, unread] = bad

    def misuse(self):
        """Makes an index or a length wrong; returns whether there was one. Kernels clamp it, the host refuses it."""
        rng = self.rng
        if self.row_index is not None:
            b, row = rng.randrange(self.batch), rng.randrange(self.row_index.shape[1])
            wrong = rng.choice([-1, self.q_rows, 2**31 - 1, -(2**31)])
            # Where it is clamped to there must be no poison.
            used = self.row_index[b].unique()
            edge = 0 if wrong < 0 else self.q_rows - 1
            if edge not in used:
                return False
            self.row_index[b, row] = edge
            self.inputs["row_index"] = self.row_index.clone()
            self.inputs["row_index"][b, row] = wrong
            return True
        if self.lengths is not None and not self.packed and (self.lengths == 0).any():
            self.inputs["lengths"] = torch.where(self.lengths == 0, rng.choice([-1, -(2**31)]), self.lengths)
            return True
        return False

    # ---- what must come out

    def expected(self, how=reference.scale_attention):
        more = {"there": self.there, "row_index": self.row_index, "kv_offset": self.kv_offset}
        return how(self.q, self.k, self.v, self.seen, self.scale, **more)

    def __str__(self):
        rows, keys = self.seen.shape
        heads = f"{self.heads}:{self.kv_heads}" if self.heads != self.kv_heads else self.heads
        special = [name for name in ["lengths", "row_index", "kv_offset", "windows"] if name in self.inputs]
        special += [f"{key}={value}" for key, value in self.settings.items() if key != "scale"]
        return f"{self.dtype} B{self.batch} H{heads} d{self.dim} {self.kind} {rows}x{keys} {' '.join(special)}"


def check(case, outputs):
    """(None or what is wrong, worst error as a share of what is allowed)"""
    out, lse = outputs["out"], outputs["lse"]
    if case.heads_first:
        out = out.transpose(1, 2)
    want, want_lse = case.expected()
    dtype = DTYPES[case.dtype]
    if out.shape != want.shape or out.dtype != dtype or lse.shape != want_lse.shape or lse.dtype != torch.float32:
        return f"{out.dtype} {list(out.shape)} and {lse.dtype} {list(lse.shape)}", 0.0
    if not out.numel():
        return None, 0.0
    error = (out.double() - want).abs()
    epsilon = torch.finfo(dtype).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    if case.kernel:
        # Weights are rounded to 16 bits before they are summed, the sum once more; the rest is f32.
        case_v, case.v = case.v, case.v.abs()
        magnitude = case.expected()[0]
        case.v = case_v
        allowed = magnitude * (epsilon + 2e-4) + want.abs() * epsilon + 2 * tiny
        lse_bound = torch.full_like(want_lse, LSE_BOUND)
    else:
        allowed = want.abs() * (epsilon + 2.0**-23) + tiny + 1e-9
        lse_bound = want_lse.abs() * 2.0**-23 + 1e-7
    # Written so that a NaN fails.
    if not (error <= allowed).all():
        at = (error / allowed).nan_to_num(torch.inf).argmax().item()
        return f"element {at} is {out.flatten()[at].item()}, not {want.flatten()[at].item()}", 0.0
    seen = want_lse > -torch.inf
    if not torch.equal(lse > -torch.inf, seen) or not ((lse - want_lse).abs()[seen] <= lse_bound[seen]).all():
        return "the log-sum-exp is off", 0.0
    # The rule of FlashAttention's tests: twice the error of PyTorch in the same dtype, and some rounding.
    rounded = want.to(dtype)
    slack = 2 * (rounded + 0.3 - 0.3 - rounded).double().abs().max().item()
    allowed = 2 * (case.expected(reference.usual) - want).abs().max().item() + slack
    worst = error.max().item()
    share = worst / allowed if allowed else float(worst > 0)
    return (f"error {worst:.2e}, more than twice PyTorch's" if share > 1 else None), share


def scale_attention(program, number, rng):
    case = Case(program.device, number, rng)
    wrong = number % 7 == 3 and case.misuse()
    what = f"{case}{' out of range' if wrong else ''}"
    repeat = 2 if number % 5 == 0 else 1
    exit_code, outputs, error = program("scale_attention", case.inputs, case.settings, repeat)
    if wrong and not case.kernel:
        refused = exit_code == 1 and ": code " in error
        return what, None if refused else f"not refused: exit code {exit_code} {error}", 0.0
    if exit_code != 0:
        return what, f"exit code {exit_code}: {error}", 0.0
    return what, *check(case, outputs)
