"""The cases of scale_attention in benches/shapes.json, without PyTorch: segments, who sees whom, how much work."""

import dataclasses


@dataclasses.dataclass
class Case:
    """What is timed. All segments are counted in tokens; what a segment sees of another it sees whole."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    dim: int
    queries: list  # tokens of each segment
    keys: list
    sees: list  # for each segment of queries the segments of keys that it sees, ascending
    capacity: int  # rows of k and v that each batch entry has: all keys, also for a step that sees fewer
    limited: int | None  # the segment of keys of which each head has a number of its own
    lengths: list | None  # [batch][kv_heads] of that

    @property
    def rows(self):
        return sum(self.queries)

    def query_ranges(self):
        return ranges(self.queries)

    def key_ranges(self):
        return ranges(self.keys)

    def seen(self, q):
        """The keys that segment q sees, as ranges (first, end) that do not touch."""
        of = self.key_ranges()
        merged = []
        for k in self.sees[q]:
            first, end = of[k]
            if merged and merged[-1][1] == first:
                merged[-1] = merged[-1][0], end
            elif first < end:
                merged.append((first, end))
        return merged

    def visible_pairs(self):
        """Pairs of a query and a key that it sees, over all heads and batch entries."""
        pairs = self.batch * self.heads * sum(
            rows * sum(self.keys[k] for k in sees) for rows, sees in zip(self.queries, self.sees)
        )
        if self.lengths is not None:
            # What each head lacks of the limited segment.
            watching = sum(rows for rows, sees in zip(self.queries, self.sees) if self.limited in sees)
            lacking = sum(self.keys[self.limited] - length for entry in self.lengths for length in entry)
            pairs -= watching * lacking * (self.heads // self.kv_heads)
        return pairs

    def useful_flops(self):
        """Two products of two operations for each pair and element."""
        return 4 * self.dim * self.visible_pairs()

    def bytes(self):
        """Read and written once, in 16 bits: q, out, and the keys and values that anyone sees; an f32 lse a row."""
        used = {k for sees in self.sees for k in sees}
        keys = self.batch * self.kv_heads * sum(self.keys[k] for k in used)
        if self.lengths is not None:
            keys -= sum(self.keys[self.limited] - length for entry in self.lengths for length in entry)
        rows = self.batch * self.heads * self.rows
        return 2 * self.dim * (2 * rows + 2 * keys) + 4 * rows


def ranges(sizes):
    """(first, end) of each of consecutive segments."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [(end - size, end) for size, end in zip(sizes, ends)]


def tokens(scale):
    """A side of a square, [height, width] or [frames, height, width]."""
    if isinstance(scale, int):
        return scale * scale
    count = 1
    for size in scale:
        count *= size
    return count


def sees(table, q, segments):
    """The segments of keys that segment q of the queries sees."""
    if not isinstance(table, str):
        return sorted(table[q])
    rules = {
        "full": lambda k: True,
        "causal": lambda k: k <= q,
        "diag": lambda k: k == q,
        # Clean blocks, then as many noised ones.
        "skip-causal": lambda k: k == q or k < q % (segments // 2),
    }
    return [k for k in range(segments) if rules[table](k)]


def expand(shape):
    """The cases of one entry of shapes.json: itself, or a case for each step."""
    keys = [tokens(scale) for scale in shape["scales"]]
    queries = [tokens(scale) for scale in shape["queries"]] if "queries" in shape else keys
    limited = lengths = None
    if "lengths" in shape:
        limited, least, most = (shape["lengths"][key] for key in ["segment", "least", "most"])
        flat = [least + i * 37 % (most - least + 1) for i in range(shape["batch"] * shape["kv_heads"])]
        lengths = [flat[i : i + shape["kv_heads"]] for i in range(0, len(flat), shape["kv_heads"])]
    case = Case(
        **{key: shape[key] for key in ["name", "batch", "heads", "kv_heads", "dim"]},
        queries=queries,
        keys=keys,
        sees=[sees(shape["table"], q, len(keys)) for q in range(len(queries))],
        capacity=sum(keys),
        limited=limited,
        lengths=lengths,
    )
    if not shape.get("steps"):
        return [case]
    return [
        dataclasses.replace(
            case,
            name=f"{case.name}/k{k}",
            queries=queries[k : k + 1],
            keys=keys[: k + 1],
            sees=[[i for i in case.sees[k] if i <= k]],
        )
        for k in range(len(queries))
    ]
