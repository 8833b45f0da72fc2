"""Random whole events for compare.py: every policy, once and again, over a cache in pages."""

import torch

from nextscale_ref import events, keep
from nextscale_ref.dtypes import DTYPES

POLICIES = ["flowcache", "rkv", "snapkv", "h2o", "keydiff", "streaming", "adakv", "scalekv"]


def compress_event(program, number, rng):
    policy = POLICIES[number % len(POLICIES)]
    types = ["bf16", "f16", "f32"] if program.device == "host" else ["bf16", "f16"]
    dtype = types[number // len(POLICIES) % len(types)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    slow = program.device == "emulated"
    sets, heads, groups = rng.choice([1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 2, 4])
    dim = rng.choice([64, 96, 128])
    block = rng.choice([1, 1, 5]) if policy == "flowcache" else 1
    page_rows = rng.choice([1, 7, 16, 50, 128]) if block == 1 else rng.choice([5, 50])
    tokens = -(-rng.randint(130, 200 if slow else 700) // page_rows) * page_rows
    window = rng.choice([4, 8]) if policy in ("rkv", "snapkv", "h2o", "adakv") else 0
    budget = rng.randint(20, 40) // block * block
    more = rng.choice([0, rng.randint(21, 90) // block * block])
    queries = window or rng.choice([1, 17, 50, 256 if slow else 300])
    height, width = rng.choice([(4, 4), (4, 5)])
    if policy == "h2o":
        queries = rng.choice([window, 33])
    rows = height * width if policy == "scalekv" else queries
    settings = {"policy": policy, "budget": budget, "page_rows": page_rows, "window": window}
    how = {"window": window}
    if policy in ("flowcache", "rkv"):
        how["lam"] = settings["lambda"] = rng.choice([0.07, 0.5])
    if policy == "streaming":
        settings["sink"] = how["sink"] = 4
    if policy == "scalekv":
        settings |= {"height": height, "width": width}
        how |= {"height": height, "width": width}
    weighting = rng.choice(["none", "none", "exponential", "gaussian"]) if policy == "flowcache" else "none"
    if policy == "flowcache":
        settings |= {"weighting": weighting, "block": block}
    floor = 0.25
    if policy == "adakv":
        settings["floor"] = floor
    if rng.random() < 0.3:
        settings["workspace"] = 100_000

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DTYPES[dtype])

    def chunk(count):
        return *(random(sets, count, heads, dim) for _ in range(2)), random(sets, rows, heads * groups, dim)

    parts = [chunk(tokens)]
    inputs = dict(zip(["k", "v", "q"], parts[0]))
    if more:
        parts.append(chunk(more))
        inputs |= dict(zip(["k_more", "v_more", "q_more"], parts[1]))
    if policy in ("keydiff", "streaming"):
        inputs = {name: it for name, it in inputs.items() if not name.startswith("q")}
    what = f"{policy} {dtype} {sets}x{tokens}+{more}x{heads}x{dim}, {budget} kept, pages of {page_rows}"
    code, out, error = program("compress_event", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    all_k = torch.cat([part[0] for part in parts], 1)
    all_v = torch.cat([part[1] for part in parts], 1)
    worst = 0.0
    for s in range(sets):
        have = [list(range(tokens)) for _ in range(heads)]
        for event, (_, _, q) in enumerate(parts):
            if event:
                have = [rows + list(range(tokens, tokens + more)) for rows in have]
            result = out["first_positions"] if event == 0 else out["positions"]
            of_head = []
            for h in range(heads):
                of_q = None if policy in ("keydiff", "streaming") else q[s, :, h * groups : (h + 1) * groups]
                of_head.append(events.scores(policy, of_q, all_k[s, have[h], h], **how))
            wanted = [budget] * heads
            if policy == "adakv":
                quotas = [keep.quota(len(rows), budget, 0, window) for rows in have]
                shares = keep.split_ada(torch.nn.utils.rnn.pad_sequence([one[0] for one in of_head], batch_first=True),
                                        quotas, floor)
                wanted = [share + window for share in shares]
            for h in range(heads):
                score, stay, slack = of_head[h]
                got = [x for x in result[s, h].tolist() if x >= 0]
                want = min(wanted[h], len(have[h]))
                # Near the cut heads may win one more or less of each other.
                if abs(len(got) - want) > (2 if policy == "adakv" else 0):
                    return what, f"event {event}, set {s}, head {h}: {len(got)} rows instead of {want}", worst
                if got != sorted(set(got)) or not set(got) <= set(have[h]):
                    return what, f"event {event}, set {s}, head {h}: positions {got[:20]}", worst
                index = {position: i for i, position in enumerate(have[h])}
                chosen = torch.zeros(len(have[h]), dtype=torch.bool)
                chosen[[index[position] for position in got]] = True
                if not bool(chosen[stay].all()):
                    return what, f"event {event}, set {s}, head {h}: a protected token is gone", worst
                items = events.blocks(score, block)
                if weighting != "none":
                    items = (items - items.min()) * keep.position_weight(weighting, len(items))
                if block > 1:
                    torn = [part for part in chosen.split(block) if bool(part.any()) != bool(part.all())]
                    if torn:
                        return what, f"event {event}, set {s}, head {h}: a block is torn", worst
                    chosen, stay = chosen[::block], stay[::block]
                free = ~stay
                kept, dropped = items[free & chosen], items[free & ~chosen]
                if len(kept) and len(dropped) and dropped.max() > kept.min():
                    worst = max(worst, ((dropped.max() - kept.min()) / (slack + 1e-30)).item())
                have[h] = got
            if sum(map(len, have)) != sum(wanted) and policy == "adakv":
                return what, f"event {event}, set {s}: {sum(map(len, have))} rows instead of {sum(wanted)}", worst
        for h in range(heads):
            count = len(have[h])
            if out["lengths"][s, h] != count:
                return what, f"set {s}, head {h}: the length is {out['lengths'][s, h]}, not {count}", worst
            for name, all_rows in [("k", all_k), ("v", all_v)]:
                if not torch.equal(out[name][s, :count, h], all_rows[s, have[h], h]):
                    return what, f"set {s}, head {h}: {name} is not the gather", worst
    return what, None if worst <= 1 else "a dropped score is above a kept one", worst


OPS = {"compress_event": compress_event}
