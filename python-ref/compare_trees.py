"""Random cases of the ops on trees of drafts for compare.py. A decision that was close in f64 is not compared."""

import math

import torch

from compare_verification import CLOSE, DTYPES, FLOATS, pick_vocab
from nextscale_ref import trees, verification

RULES = ["greedy", "match", "reject"]


def links_of(parents):
    """first_child, next_sibling of [batch, nodes] parents, children in ascending order."""
    first, following = torch.full_like(parents, -1), torch.full_like(parents, -1)
    for b in range(len(parents)):
        for node in range(parents.shape[1] - 1, 0, -1):
            parent = parents[b, node]
            if parent >= 0:
                following[b, node] = first[b, parent]
                first[b, parent] = node
    return first, following


def tree_verify(program, number, rng):
    rule, dtype, draft_dtype = number % 3, FLOATS[number // 3 % 3], FLOATS[number // 9 % 3]
    rule = 2 if rng.random() < 0.4 else rule
    kind, distinct = rng.choice(["none", "logits", "logits", "stats"]), rng.randrange(2)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, batch, nodes = pick_vocab(rng), rng.choice([0, 1, 2, 5]), rng.choice([1, 2, 5, 12, 40])
    max_depth = rng.choice([0, 1, 3, 6])
    parents = torch.full([batch, nodes], -1, dtype=torch.int32)
    for b in range(batch):
        for node in range(1, nodes):
            parents[b, node] = rng.choice([0, node - 1, rng.randrange(node), rng.randrange(node), -1])
    rows = batch * nodes
    target = ((torch.rand([rows, vocab], generator=generator) * 6 - 3)).to(DTYPES[dtype])
    temperature = torch.tensor([rng.choice([1.0, 0.7, 1.5, 0.0, 0.2]) for _ in range(batch)])
    settings = {"rule": RULES[rule], "fallback": -7, "distinct": distinct, "max_depth": max_depth}
    inputs = {"target": target, "temperature": temperature}
    sampling = [(t, 0, 1.0, 0.0) for t in temperature.tolist()]
    if rng.random() < 0.3:
        top_k = torch.tensor([rng.choice([0, 1, 5, 40]) for _ in range(batch)], dtype=torch.int32)
        top_p = torch.tensor([rng.choice([1.0, 0.9, 0.5]) for _ in range(batch)])
        min_p = torch.tensor([rng.choice([0.0, 0.05, 0.3]) for _ in range(batch)])
        inputs |= {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling = list(zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist()))
    rules = [rule] * batch
    if rng.random() < 0.3:
        rules = [rng.randrange(3) for _ in range(batch)]
        inputs["rules"] = torch.tensor(rules, dtype=torch.int32)
    noise = rng.choice([0.5, 3.0, 8.0])
    draft = target.float() + (torch.rand([rows, vocab], generator=generator) - 0.5) * noise
    draft = draft.to(DTYPES[draft_dtype])
    drafts = torch.full([batch, nodes], -1, dtype=torch.int32)
    for b in range(batch):
        for parent in range(nodes):
            weights = (draft[b * nodes + parent].float() / max(sampling[b][0], 0.1)).softmax(0)
            for node in (parents[b] == parent).nonzero()[:, 0].tolist():
                if not weights.sum() > 0:
                    continue
                drafts[b, node] = int(torch.multinomial(weights, 1, generator=generator))
                if distinct:
                    weights[drafts[b, node]] = 0
                if rng.random() < 0.03:
                    drafts[b, node] = rng.choice([-1, vocab])
    inputs["drafts"] = drafts
    if rng.random() < 0.5:
        inputs["parents"] = parents
    else:
        inputs["first_child"], inputs["next_sibling"] = links_of(parents)
    if kind != "none":
        inputs["draft"] = draft
    if kind == "stats":
        code, made, error = program(
            "draft_sample", {"logits": draft, "temperature": temperature.repeat_interleave(nodes)}, {})
        if code:
            return "its draft_sample", f"exit code {code}: {error}", 0.0
        inputs["draft_stats"] = made["stats"]
    given = rng.random() < 0.5
    uniforms = torch.randint(0, 1 << 24, [batch, nodes, 4], generator=generator).float() * 2.0**-24
    seeds = torch.randint(-(2**62), 2**62, [batch], generator=generator)
    positions = torch.randint(0, 2**40, [batch], generator=generator)
    inputs |= {"uniforms": uniforms} if given else {"seeds": seeds, "positions": positions}
    start = torch.randint(0, 1 << 20, [batch], generator=generator).int()
    inputs["kv_start"] = start
    what = f"{RULES[rule]} {dtype} {kind} {draft_dtype} {batch}x{nodes} of {vocab}{' distinct' if distinct else ''}"
    code, out, error = program("tree_verify", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    compared, columns = 0, max_depth + 1
    for b in range(batch):
        margin = [1.0]

        def p(node, b=b, margin=margin):
            return verification.probabilities(target[b * nodes + node], *sampling[b], rules[b] == 0, margin)

        def q(node, b=b, margin=margin):
            if kind == "none" or sampling[b][0] < 1e-5:
                return None
            return verification.probabilities(draft[b * nodes + node], sampling[b][0], 0, 1.0, 0.0, False, margin)

        def children(node, b=b):
            return [at for at in (parents[b] == node).nonzero()[:, 0].tolist() if 0 <= drafts[b, at] < vocab]

        def token(node, b=b):
            return int(drafts[b, node])

        seed, position = seeds[b].item() % 2**64, positions[b].item()

        def draws(node, depth, b=b, seed=seed, position=position):
            if given:
                return (uniforms[b, node, 1:].tolist(),) * 2
            return verification.draws(seed, position + depth, depth)[1:]

        def accept(node, depth, child, number, b=b, seed=seed, position=position):
            return uniforms[b, child, 0].item() if given else trees.accept_draw(seed, position, depth, number)

        path, last = trees.walk(rules[b], p, q, children, token, max_depth, distinct, draws, accept, margin)
        if margin[0] < CLOSE:
            continue
        padding = [-1] * (columns - len(path))
        tokens = [token(node) for node in path[1:]] + [-7 if last is None else last]
        for name, expected in [
            ("tokens", tokens),
            ("path", path),
            ("kv_source", [start[b].item() + node for node in path]),
            ("kv_destination", [start[b].item() + i for i in range(len(path))]),
        ]:
            if out[name][b].tolist() != expected + padding:
                return what, f"request {b}: {name} {out[name][b].tolist()} instead of {expected}", 0.0
        if (out["accepted"][b], out["emitted"][b]) != (len(path) - 1, len(path)):
            return what, f"request {b}: {out['accepted'][b]} accepted instead of {len(path) - 1}", 0.0
        if out["last_row"][b] != b * nodes + path[-1]:
            return what, f"request {b}: last row {out['last_row'][b]}", 0.0
        for i, (node, emitted) in enumerate(zip(path, tokens)):
            of_node = p(node)
            # Those of greedy rows are at temperature 1.
            exact = of_node[emitted] if max(of_node) < 1 and emitted >= 0 else None
            if exact and abs(out["log_probs"][b, i].item() - math.log(exact)) > 1e-4:
                return what, f"log probability {out['log_probs'][b, i].item()} instead of {math.log(exact)}", 0.0
        compared += 1
    return f"{what}, {compared} compared", None, 0.0


def tree_build(program, number, rng):
    batch, candidates = rng.choice([0, 1, 3]), rng.choice([1, 2, 33, 60, rng.randint(1, 300)])
    max_depth, sums, chooses = rng.choice([0, 2, 6, 20]), rng.randrange(2), number % 2 == 0
    nodes = rng.randint(1, candidates) if chooses else candidates
    leaves = rng.randint(1, nodes)
    parents = torch.full([batch, candidates], -1, dtype=torch.int32)
    for b in range(batch):
        for node in range(1, candidates):
            parents[b, node] = rng.choice([0, node - 1, rng.randrange(node), rng.randrange(node), -1])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    drafts = torch.randint(0, 1000, [batch, candidates], generator=generator).int()
    scores = -torch.rand([batch, candidates], generator=generator) * 3
    if rng.random() < 0.4:
        scores = scores.round()
    positions = torch.randint(0, 2**40, [batch], generator=generator)
    inputs = {"parents": parents, "drafts": drafts, "positions": positions}
    settings = {"leaves": leaves, "max_depth": max_depth}
    if chooses:
        inputs["scores"] = scores
        settings |= {"nodes": nodes, "sums": sums}
    what = f"{batch}x{candidates}{f' to {nodes}' if chooses else ''}, {leaves} leaves, depth {max_depth}"
    code, out, error = program("tree_build", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    words = -(-nodes // 32)
    for b in range(batch):
        of = parents[b].tolist()
        paths = trees.paths_of(of, max_depth)
        chosen = list(range(candidates))
        if chooses:
            chosen = trees.choose(of, scores[b].tolist(), nodes, max_depth, sums)
        number_of = {candidate: node for node, candidate in enumerate(chosen)}
        known = [(node, candidate, [number_of[at] for at in paths[candidate]])
                 for node, candidate in enumerate(chosen) if paths[candidate]]
        expected = {name: [-1] * nodes for name in ["selected", "parents", "drafts", "first_child", "next_sibling",
                                                    "depths"]}
        expected["node_positions"] = [positions[b].item()] * nodes
        mask = [0] * (nodes * words)
        for node, candidate, path in known:
            expected["selected"][node] = candidate
            expected["drafts"][node] = drafts[b, candidate].item()
            expected["depths"][node] = len(path) - 1
            expected["node_positions"][node] += len(path) - 1
            for at in path:
                mask[node * words + at // 32] |= 1 << at % 32
        for node, candidate, path in reversed(known):
            if node > 0:
                parent = path[-2]
                expected["parents"][node] = parent
                expected["next_sibling"][node] = expected["first_child"][parent]
                expected["first_child"][parent] = node
        for name, values in expected.items():
            if out[name][b].tolist() != values:
                return what, f"tree {b}: {name} differ", 0.0
        if out["mask"][b].flatten().tolist() != mask:
            return what, f"tree {b}: masks differ", 0.0
        # In the order of trial: by the paths themselves.
        tips = sorted(path for node, _, path in known if expected["first_child"][node] < 0)
        rows = [path + [-1] * (max_depth + 1 - len(path)) for path in tips[:leaves]]
        rows += [[-1] * (max_depth + 1)] * (leaves - len(rows))
        if out["paths"][b].tolist() != rows or out["leaf_counts"][b] != min(len(tips), leaves):
            return what, f"tree {b}: paths differ", 0.0
        if out["counts"][b] != len(chosen):
            return what, f"tree {b}: {out['counts'][b]} nodes", 0.0
    return what, None, 0.0


OPS = {"tree_verify": tree_verify, "tree_build": tree_build}
