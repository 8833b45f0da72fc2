"""What PyTorch and flash-kmeans offer for RVQ encode. bench_peers.py checks and times it.

flash-kmeans (Triton) comes as the optional wheel `flash-kmeans`; without it its peers are left out. Norms of codebooks are
made beforehand and not timed. No peer is exact: a code that differs is no error, its share is printed.
"""

import torch
import torch.nn.functional as F

from nextscale_ref import rvq_encode as reference
from peers_common import ALWAYS, BEST, FULL, compiled

try:
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton
except ImportError as error:
    euclid_assign_triton = None
    print(f"SKIPPED flash-kmeans: {error}", flush=True)

# Rows whose exact scores the reference holds at a time.
REFERENCE_ROWS = 4096


class RvqEncode:
    """Inputs of one case and the expressions that compute it: codes [levels, rows], int64."""

    MODES = ["graph", "eager", "cold"]

    @staticmethod
    def cases(shape):
        # Another kernel of ours has the same peers.
        return [(shape["name"], None if shape.get("variant") else shape)]

    @staticmethod
    def smaller(case):
        return None if case is None else case | {"rows": min(case["rows"], 33), "entries": min(case["entries"], 100)}

    def __init__(self, case, device):
        self.case, self.levels, self.shared = case, case["levels"], case["shared"]
        self.cosine = case["metric"] != "l2"
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, latent, dim = device, case.get("latent", 0), case["dim"]
        books = 1 if self.shared else self.levels
        scale = 0.9 ** torch.arange(books, device=device)[:, None, None]
        self.source = self.rows([books, case["entries"], dim]) * scale
        self.x = self.rows([case["rows"], latent or dim])
        self.projections = None
        if latent:
            shapes = [[books, dim, latent], [books, dim], [books, latent, dim], [books, latent]]
            self.projections = [self.normal(shape) / latent**0.5 for shape in shapes]
        self.search, self.values = reference.codebooks(self.source, case["metric"])
        self.squares = self.search.square().sum(-1)
        self.half = [self.search.bfloat16(), self.squares]
        self.want = None

    def normal(self, shape):
        return torch.randn(shape, generator=self.generator, device=self.device)

    def rows(self, shape):
        rows = self.normal(shape)
        if self.case["data"] == "clusters":
            of_centres = torch.Generator(self.device).manual_seed(9)
            centres = torch.randn([64, shape[-1]], generator=of_centres, device=self.device)
            which = torch.randint(0, 64, shape[:-1], generator=self.generator, device=self.device)
            rows = centres[which] + 0.1 * rows
        return rows

    def reference(self):
        if self.want is None:
            how = dict(levels=self.levels, metric=self.case["metric"], projections=self.projections)
            parts = [
                reference.rvq_encode(x, (self.search, self.values), **how)[0] for x in self.x.split(REFERENCE_ROWS)
            ]
            self.want = torch.cat(parts, 1)
        # Any code is close enough; equality is told apart.
        return self.want, torch.full_like(self.want, self.case["entries"], dtype=torch.float32)

    def result(self, out):
        flips = (out != self.want).double().mean().item()
        print(f"{self.case['name']:<28}{'':<7}{flips:.4%} of the codes differ", flush=True)
        return out

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        for tf32, name in [(False, "fp32"), (True, "tf32")]:
            yield f"eager {name}", ALWAYS, lambda t=tf32: self.call(self.expanded, t)
            yield f"compile a level {name}", BEST, lambda t=tf32: self.compiled(t, "default")
            yield f"compile max-autotune a level {name}", BEST if tf32 else FULL, lambda t=tf32: self.compiled(
                t, "max-autotune-no-cudagraphs"
            )
        yield "cdist fp32", ALWAYS, lambda: self.call(self.cdist, False)
        if euclid_assign_triton and self.device != "cpu":
            yield "flash-kmeans fp32 (tf32 inside)", ALWAYS, lambda: self.call(self.flash, True)
            yield "flash-kmeans bf16", ALWAYS, lambda: self.call(self.flash_half, True)

    def call(self, nearest, tf32):
        return lambda: self.encode(nearest, tf32)

    def compiled(self, tf32, mode):
        nearest = compiled(self.expanded, mode)
        return lambda: self.encode(nearest, tf32)

    def encode(self, nearest, tf32):
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            left, codes = self.x, []
            for level in range(self.levels):
                book = 0 if self.shared else level
                row = left
                if self.projections:
                    row = F.linear(left, self.projections[0][level], self.projections[1][level])
                if self.cosine:
                    row = F.normalize(row, dim=-1)
                code = nearest(row, self.search[book], self.squares[book], book)
                codes.append(code)
                if level + 1 < self.levels:
                    taken = F.embedding(code, self.values[book])
                    if self.projections:
                        taken = F.linear(taken, self.projections[2][level], self.projections[3][level])
                    left = left - taken
            return torch.stack(codes)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @staticmethod
    def expanded(row, codes, squares, book):
        return (row.square().sum(1, keepdim=True) - 2 * row @ codes.t() + squares).argmin(1)

    @staticmethod
    def cdist(row, codes, squares, book):
        return torch.cdist(row[None], codes[None])[0].argmin(1)

    @staticmethod
    def flash(row, codes, squares, book):
        return euclid_assign_triton(row[None].contiguous(), codes[None], row.square().sum(1)[None])[0].long()

    def flash_half(self, row, codes, squares, book):
        row = row.bfloat16()
        return euclid_assign_triton(row[None], self.half[0][book][None], row.float().square().sum(1)[None])[0].long()
