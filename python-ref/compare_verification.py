"""Random cases of the verification ops for compare.py. A decision that was close in f64 is not compared."""

import math

import torch

from nextscale_ref import verification
from nextscale_ref.dtypes import DTYPES

FLOATS = list(DTYPES)
RULES = ["greedy", "match", "reject", "block"]
# Closer than this, f32 may decide otherwise than f64.
CLOSE = 1e-4


def pick_vocab(rng):
    return rng.choice([2, 7, 33, 64, 1000, 1025, 3001, rng.randint(2, 2500)])


def verify(program, number, rng):
    rule, dtype, draft_dtype = number % 4, FLOATS[number // 4 % 3], FLOATS[number // 12 % 3]
    kind = ["none", "logits", "stats"][number // 36 % 3] if rng.random() < 0.3 else rng.choice(["logits", "stats"])
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, batch, most = pick_vocab(rng), rng.choice([0, 1, 2, 5]), rng.choice([0, 1, 2, 4])
    counts = [rng.randint(0, most + 1) for _ in range(batch)]
    cu_rows = [0]
    for count in counts:
        cu_rows.append(cu_rows[-1] + count)
    rows = batch * (most + 1)
    target = torch.rand([rows, vocab], generator=generator) * 6 - 3
    temperature = torch.tensor([rng.choice([1.0, 0.7, 1.5, 0.0, 0.2]) for _ in range(batch)])
    settings = {"rule": RULES[rule], "fallback": -7, "trials": 0}
    inputs = {"target": target.to(DTYPES[dtype]), "cu_rows": torch.tensor(cu_rows, dtype=torch.int32),
              "temperature": temperature}
    sampling = [(t, 0, 1.0, 0.0) for t in temperature.tolist()]
    if rng.random() < 0.4:
        top_k = torch.tensor([rng.choice([0, 1, 5, 40]) for _ in range(batch)], dtype=torch.int32)
        top_p = torch.tensor([rng.choice([1.0, 0.9, 0.5]) for _ in range(batch)])
        min_p = torch.tensor([rng.choice([0.0, 0.05, 0.3]) for _ in range(batch)])
        inputs |= {"top_k": top_k, "top_p": top_p, "min_p": min_p}
        sampling = list(zip(temperature.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist()))
    rules = [rule] * batch
    if rng.random() < 0.3:
        rules = [rng.randrange(4) for _ in range(batch)]
        inputs["rules"] = torch.tensor(rules, dtype=torch.int32)
    drafts = torch.full([batch, most + 1], -1, dtype=torch.int32)
    flat = drafts.view(-1)
    draft = torch.zeros([max(batch * most, 1), vocab])
    for b, count in enumerate(counts):
        for i in range(count - 1):
            row = cu_rows[b] + i
            noisy = target[row] + (torch.rand(vocab, generator=generator) - 0.5) * rng.choice([0.5, 3.0])
            draft[b * most + i] = noisy
            p = (draft[b * most + i] / max(sampling[b][0], 0.1)).softmax(0)
            flat[row] = int(torch.multinomial(p, 1, generator=generator))
            if rng.random() < 0.05:
                flat[row] = rng.choice([-1, vocab])
    draft = draft.to(DTYPES[draft_dtype])
    if kind != "none":
        inputs["draft"] = draft
    if kind == "stats":
        of_rows = torch.ones(len(draft))
        for b in range(batch):
            of_rows[b * most : (b + 1) * most] = sampling[b][0]
        code, made, error = program("draft_sample", {"logits": draft, "temperature": of_rows}, {})
        if code:
            return "its draft_sample", f"exit code {code}: {error}", 0.0
        inputs["draft_stats"] = made["stats"]
    given = rng.random() < 0.5
    uniforms = torch.randint(0, 1 << 24, [batch, most + 1, 4], generator=generator).float() * 2.0**-24
    seeds = torch.randint(-(2**62), 2**62, [batch], generator=generator)
    positions = torch.randint(0, 2**40, [batch], generator=generator)
    if given:
        inputs["uniforms"] = uniforms
    else:
        inputs |= {"seeds": seeds, "positions": positions}
    inputs["drafts"] = drafts
    what = f"{RULES[rule]} {dtype} {kind} {draft_dtype} {batch}x{most} of {vocab}"
    code, out, error = program("verify", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0

    compared = 0
    for b, count in enumerate(counts):
        tokens = out["tokens"][b].tolist()
        if count == 0:
            if tokens != [-1] * (most + 1) or out["emitted"][b] != 0 or out["last_row"][b] != -1:
                return what, f"request {b} has no rows, but {tokens}", 0.0
            continue
        margin = [1.0]
        first = cu_rows[b]
        p = [verification.probabilities(inputs["target"][first + i], *sampling[b], rules[b] == 0, margin)
             for i in range(count)]
        ids = [d if 0 <= d < vocab else None for d in flat[first : first + count - 1].tolist()]
        q = []
        for i, d in enumerate(ids):
            if d is None:
                q.append(None)
            elif kind == "none" or sampling[b][0] < 1e-5:
                q.append([float(x == d) for x in range(vocab)])
            else:
                q.append(verification.probabilities(draft[b * most + i], sampling[b][0], 0, 1.0, 0.0, False, margin))

        def of_row(i, b=b):
            if given:
                accept, *token = uniforms[b, i].tolist()
                return accept, token, token
            return verification.draws(seeds[b].item() % 2**64, positions[b].item() + i, i)

        accepted, token = verification.decide(rules[b], p, q, ids, of_row, margin)
        if margin[0] < CLOSE:
            continue
        expected = flat[first : first + accepted].tolist() + [-7 if token is None else token]
        expected += [-1] * (most + 1 - len(expected))
        if tokens != expected or out["accepted"][b] != accepted or out["emitted"][b] != accepted + 1:
            return what, f"request {b}: {tokens} instead of {expected}", 0.0
        if out["last_row"][b] != first + accepted:
            return what, f"request {b}: last row {out['last_row'][b]}", 0.0
        for i, emitted in enumerate(expected[: accepted + 1]):
            # Those of greedy rows are at temperature 1.
            exact = p[i][emitted] if max(p[i]) < 1 else None
            if exact and abs(out["log_probs"][b, i].item() - math.log(exact)) > 1e-4:
                return what, f"log probability {out['log_probs'][b, i].item()} instead of {math.log(exact)}", 0.0
        compared += 1
    return f"{what}, {compared} compared", None, 0.0


def draft_sample(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, rows, row_in_step = pick_vocab(rng), rng.choice([0, 1, 3, 8]), rng.randint(0, 7)
    logits = ((torch.rand([rows, vocab], generator=generator) - 0.5) * 8).to(DTYPES[dtype])
    temperature = torch.tensor([rng.choice([1.0, 0.5, 2.0, 0.0]) for _ in range(rows)])
    top_k = torch.tensor([rng.choice([0, 0, 1, 20]) for _ in range(rows)], dtype=torch.int32)
    top_p = torch.tensor([rng.choice([1.0, 0.8]) for _ in range(rows)])
    min_p = torch.tensor([rng.choice([0.0, 0.1]) for _ in range(rows)])
    seeds = torch.randint(-(2**62), 2**62, [rows], generator=generator)
    positions = torch.randint(0, 2**40, [rows], generator=generator)
    inputs = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
              "seeds": seeds, "positions": positions}
    count, distinct, numbered = rng.choice([1, 1, 2, 4, 9, 32]), rng.random() < 0.8, rng.random() < 0.4
    numbers = torch.randint(0, 1 << 24, [rows], generator=generator).to(torch.int32)
    if numbered:
        inputs["rows_in_step"] = numbers
    what = f"{dtype} {rows} of {vocab}, {count}{' distinct' if distinct else ''}, draft {row_in_step}"
    settings = {"row_in_step": row_in_step, "drafts": count, "distinct": str(distinct).lower(), "fallback": -7}
    code, out, error = program("draft_sample", inputs, settings, repeat=2 if number % 5 == 0 else 1)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    for r in range(rows):
        margin = [1.0]
        of = temperature[r].item(), top_k[r].item(), top_p[r].item(), min_p[r].item()
        p = verification.probabilities(logits[r], *of, False, margin)
        greedy = of[0] < 1e-5
        row = numbers[r].item() if numbered else row_in_step
        position, seed = positions[r].item() + (0 if numbered else row_in_step), seeds[r].item() % 2**64
        left, order = list(p), logits[r].float().sort(descending=True, stable=True).indices.tolist()
        for j in range(count):
            words = verification.philox.block(seed, position, row << 8, j)
            if greedy:
                token = order[j if distinct else 0] if j < vocab or not distinct else None
            else:
                token = verification.sample(left, [(word >> 8) * 2.0**-24 for word in words[:3]], margin)
            if margin[0] < CLOSE:
                break
            if out["tokens"][r, j] != (-1 if token is None else token):
                return what, f"row {r}, draft {j}: {out['tokens'][r, j]} instead of {token}", 0.0
            log_prob = out["log_probs"][r, j].item()
            want = math.nan if token is None else math.log(p[token]) if p[token] > 0 else -math.inf
            if not (abs(log_prob - want) <= 1e-4 or log_prob == want or (math.isnan(log_prob) and math.isnan(want))):
                return what, f"row {r}, draft {j}: log probability {log_prob} instead of {want}", 0.0
            if distinct and token is not None:
                left[token] = 0.0
    return what, None, 0.0


def row_stats(program, number, rng):
    dtype = FLOATS[number % 3]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    vocab, rows = rng.choice([1, 1023, 1024, 1025, 5000, rng.randint(1, 9000)]), rng.choice([0, 1, 3, 8])
    logits = ((torch.rand([rows, vocab], generator=generator) - 0.5) * 20).to(DTYPES[dtype])
    temperature = torch.rand([rows], generator=generator) * 2 + 0.1
    what = f"{dtype} {rows} of {vocab}"
    code, out, error = program("row_stats", {"logits": logits, "temperature": temperature}, {}, repeat=2)
    if code:
        return what, f"exit code {code}: {error}", 0.0
    exact = verification.partials(logits, temperature)
    if not torch.equal(out["partials"][..., 0].double(), exact[..., 0]):
        return what, "greatest logits differ", 0.0
    # Where a reference was nearly rounded the other way, the sum is off by a factor of two.
    ratio = out["partials"][..., 1].double() / exact[..., 1]
    error = torch.stack([(ratio * factor - 1).abs() for factor in (0.5, 1, 2)]).amin(0)
    share = (error / 2e-5).max().item() if error.numel() else 0.0
    return what, None if share <= 1 else "sums differ", share
