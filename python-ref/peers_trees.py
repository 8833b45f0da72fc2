"""What PyTorch offers for the verification of trees of drafts. bench_peers.py checks and times it.

Two ways: `all rows` makes the distributions of every node at once and then looks for the path; `walking` gathers the rows of
the nodes that the walk is at, level by level. Both take logits, the tree and the uniforms of the accept tests, and return how
many drafts of each request they accept, which is checked unless a token of the target decides (match), and the token that
follows.
"""

import torch

from nextscale_ref.dtypes import DTYPES
from peers_common import ALWAYS, COMPILERS, Case, compiled


def parents_of(levels):
    """The tree of a case: of the nodes of a level the first third have the next level's nodes as children."""
    parents, first, before = [-1], 0, 1
    for width in levels:
        used = min(before, max(1, width // 3))
        parents += [first + k * used // width for k in range(width)]
        first, before = first + before, width
    return parents


class TreeVerify(Case):
    """Inputs of one case and the calls that decide it."""

    @staticmethod
    def smaller(case):
        return case | {"batch": min(case["batch"], 3), "vocab": min(case["vocab"], 1000)}

    def __init__(self, case, device):
        self.case, self.device, self.rule, self.distinct = case, device, case["rule"], case["distinct"]
        self.batch, self.vocab, self.depth = case["batch"], case["vocab"], len(case["levels"])
        self.parents = parents_of(case["levels"])
        n = self.nodes = len(self.parents)
        children = [[node for node in range(n) if self.parents[node] == parent] for parent in range(n)]
        self.most = max(map(len, children))
        # Node n is none: its token is no token, and it has no children.
        padded = [of + [n] * (self.most - len(of)) for of in children] + [[n] * self.most]
        self.children = torch.tensor(padded, device=device)
        generator = torch.Generator(device).manual_seed(0)
        dtype = DTYPES[case["dtype"]]
        self.target = (torch.rand(self.batch, n, self.vocab, generator=generator, device=device) * 8 - 4).to(dtype)
        self.tokens = torch.randint(0, self.vocab, (self.batch, n + 1), generator=generator, device=device)
        if case["peak"]:
            # The first child's token has this probability: the others together weigh about 6.82 each.
            weight = torch.tensor(6.82 * self.vocab * case["peak"] / (1 - case["peak"])).log().item()
            for parent in range(n):
                if children[parent]:
                    at = self.tokens[:, children[parent][0], None]
                    self.target[:, parent].scatter_(1, at, weight)
        self.draft = None
        if self.rule == "reject":
            noise = torch.rand(self.batch, n, self.vocab, generator=generator, device=device) * 2 - 1
            self.draft = (self.target.float() + noise * case["noise"]).to(dtype)
            del noise
        for parent in range(n):
            if not children[parent]:
                continue
            first, count = children[parent][0], len(children[parent])
            if self.rule == "greedy":
                # Above all others: which of equal ones argmax takes is not said.
                self.target[:, parent].scatter_(1, self.tokens[:, first, None], 8.0)
            elif self.rule == "reject":
                q = self.draft[:, parent].float().softmax(-1)
                drawn = torch.multinomial(q, count, replacement=not self.distinct, generator=generator)
                self.tokens[:, children[parent]] = drawn
        self.tokens[:, n] = -1
        self.uniforms = torch.rand(self.batch, n + 1, generator=generator, device=device)

    def reference(self):
        """Drafts accepted, in f64. Sampled match draws at random: nothing is asked of it."""
        if self.rule == "match":
            middle = torch.full([self.batch], self.depth / 2, device=self.device)
            return middle, middle
        want = torch.zeros(self.batch, device=self.device)
        for b in range(self.batch):
            node = 0
            for _ in range(self.depth):
                row = self.target[b, node].double()
                onward = None
                if self.rule == "reject":
                    left, rest = row.softmax(-1), self.draft[b, node].double().softmax(-1)
                for child in self.children[node].tolist():
                    if child == self.nodes:
                        break
                    x = self.tokens[b, child]
                    if self.rule == "greedy":
                        taken = row.argmax() == x
                    else:
                        taken = self.uniforms[b, child].double() * rest[x] < left[x]
                    if taken:
                        onward = child
                        break
                    if self.rule == "reject":
                        left = (left - rest).clamp(min=0)
                        left = left / left.sum()
                        if self.distinct:
                            rest = rest.clone()
                            rest[x] = 0
                            rest = rest / rest.sum()
                if onward is None:
                    break
                node = onward
                want[b] += 1
        return want, torch.zeros_like(want)

    def result(self, out):
        return out[0]

    def peers(self):
        """Yields (name, when it is worth its time, a function that makes the call)."""
        if self.rule == "reject":
            yield "as written: walking", ALWAYS, self.walk_rejecting
            for mode, label, when in COMPILERS:
                yield f"{label} a step: walking", when, lambda mode=mode: self.walk_rejecting(mode)
            return
        for name, way in [("walking", self.walk_by_token), ("all rows", self.all_rows)]:
            yield f"as written: {name}", ALWAYS, lambda way=way: way
            for mode, label, when in COMPILERS:
                yield f"{label}: {name}", when, lambda way=way, mode=mode: compiled(way, mode)

    def drawn(self, rows):
        """A token of each row."""
        if self.rule == "greedy":
            return rows.argmax(-1)
        noise = torch.empty_like(rows, dtype=torch.float32).exponential_()
        return (rows.float().softmax(-1) / noise).argmax(-1)

    def all_rows(self):
        best = self.drawn(self.target)
        alive = torch.ones(self.batch, dtype=torch.bool, device=best.device)
        node = torch.zeros(self.batch, dtype=torch.long, device=best.device)
        accepted = torch.zeros(self.batch, device=best.device)
        for _ in range(self.depth):
            token = best.gather(1, node[:, None])
            node, alive = self.onward(node, alive, token)
            accepted = accepted + alive
        return accepted, best.gather(1, node[:, None])[:, 0]

    def onward(self, node, alive, token):
        """To the child that is `token`, of those requests that are still walking."""
        children = self.children[node]
        ok = (self.tokens.gather(1, children) == token) & alive[:, None]
        found = ok.any(-1)
        child = children.gather(1, ok.long().argmax(-1, keepdim=True))[:, 0]
        return torch.where(found, child, node), found

    def walk_by_token(self):
        b = torch.arange(self.batch, device=self.target.device)
        alive = torch.ones(self.batch, dtype=torch.bool, device=b.device)
        node, accepted, last = torch.zeros_like(b), torch.zeros(self.batch, device=b.device), torch.zeros_like(b)
        for level in range(self.depth + 1):
            token = self.drawn(self.target[b, node])
            last = torch.where(alive, token, last)
            if level < self.depth:
                node, alive = self.onward(node, alive, token[:, None])
                accepted = accepted + alive
        return accepted, last

    def walk_rejecting(self, mode=None):
        """A call; a compiler gets each step of it: of the whole walk it would make a minute's work for each case."""
        begin, attempt, draw = self.rows_of, self.attempt, self.draw
        if mode:
            torch._dynamo.reset()
            begin, attempt, draw = (torch.compile(f, mode=mode, dynamic=False) for f in (begin, attempt, draw))
        children = self.children.T.contiguous()

        def walk():
            alive = torch.ones(self.batch, dtype=torch.bool, device=children.device)
            node = torch.zeros(self.batch, dtype=torch.long, device=children.device)
            accepted, last = torch.zeros(self.batch, device=children.device), torch.zeros_like(node)
            for level in range(self.depth + 1):
                left, rest = begin(node)
                onward, going = node, torch.zeros_like(alive)
                if level < self.depth:
                    for child in children[:, node].contiguous().unbind(0):
                        left, rest, onward, going = attempt(left, rest, onward, going, alive, child)
                last = draw(left, alive & ~going, last)
                node, alive = onward, going
                accepted = accepted + going
            return accepted, last

        return walk

    def rows_of(self, node):
        """p and q after the nodes that the walks are at."""
        b = torch.arange(self.batch, device=node.device)
        return self.target[b, node].float().softmax(-1), self.draft[b, node].float().softmax(-1)

    def attempt(self, left, rest, onward, going, alive, child):
        """A child of each request, tested where one is left to test; what is left of p and q where it fails."""
        b = torch.arange(self.batch, device=child.device)
        x = self.tokens[b, child].clamp(min=0)[:, None]
        trying = (child < self.nodes) & alive & ~going
        passes = self.uniforms[b, child] * rest.gather(1, x)[:, 0] < left.gather(1, x)[:, 0]
        onward = torch.where(trying & passes, child, onward)
        failed = (trying & ~passes)[:, None]
        residual = (left - rest).clamp(min=0)
        left = torch.where(failed, residual / residual.sum(-1, keepdim=True), left)
        if self.distinct:
            fewer = rest.scatter(1, x, 0)
            rest = torch.where(failed, fewer / fewer.sum(-1, keepdim=True), rest)
        return left, rest, onward, going | (trying & passes)

    def draw(self, left, ending, last):
        return torch.where(ending, (left / torch.empty_like(left).exponential_()).argmax(-1), last)
