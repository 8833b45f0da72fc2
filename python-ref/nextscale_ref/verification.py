"""Verification of drafts in f64, from the definitions, with the draws that nextscale documents."""

import math

import torch

from nextscale_ref import philox

GREEDY, MATCH, REJECT, BLOCK = range(4)
LANES = 32


def order(vocab):
    """Columns by chunk, lane and place: the order of the inverse of the cumulative sum. [[[columns of a lane]]]."""
    chunks = -(-vocab // 1024)
    levels = []
    for chunk in (c for lane in range(LANES) for c in range(lane, chunks, LANES)):
        lanes = []
        for lane in range(LANES):
            columns = [chunk * 1024 + place // 8 * 256 + lane * 8 + place % 8 for place in range(LANES)]
            lanes.append([column for column in columns if column < vocab])
        levels.append([lane for lane in lanes if lane])
    return levels


def pick(weights, uniform, margin):
    """The first at which the running sum exceeds uniform of the whole. margin[0]: how close that was to another one."""
    whole, total, found = sum(weights), 0.0, None
    if not whole > 0:
        return None
    for at, weight in enumerate(weights):
        total += weight / whole
        if weight > 0:
            if at + 1 < len(weights):
                margin[0] = min(margin[0], abs(total - uniform))
            if found is None and total > uniform:
                found = at
    return max(at for at, weight in enumerate(weights) if weight > 0) if found is None else found


def sample(weights, uniforms, margin):
    """A column by three uniforms; weights is a list."""
    if sum(weight > 0 for weight in weights) == 1:
        return next(at for at, weight in enumerate(weights) if weight > 0)
    levels = order(len(weights))
    for uniform in uniforms:
        masses = [math.fsum(mass_of(level, weights)) for level in levels]
        at = pick(masses, uniform, margin)
        if at is None:
            return None
        levels = levels[at]
    return levels


def mass_of(level, weights):
    return [weights[level]] if isinstance(level, int) else [m for inner in level for m in mass_of(inner, weights)]


def probabilities(logits, temperature, top_k, top_p, min_p, greedy, margin):
    """Softmax of a row (f64 tensor) after truncation, as a list; all 0 where nothing is allowed."""
    logits = logits.double()
    real = torch.where(logits.isnan(), -torch.inf, logits)
    top = real.max().item()
    p = torch.zeros_like(real)
    if top == -math.inf:
        return p.tolist()
    if greedy or temperature < 1e-5 or math.isinf(top):
        p[(real == top).nonzero()[0, 0]] = 1
        return p.tolist()
    p = ((real - top) / temperature).exp()
    descending = real.sort(descending=True).values
    cut = -math.inf
    if 0 < top_k < len(real):
        cut = descending[top_k - 1].item()
    if min_p > 0:
        margin[0] = min(margin[0], (p / min_p - 1).abs().min().item())
        kept = real[p >= min_p]
        cut = max(cut, kept.min().item() if len(kept) else top)
    if top_p < 1:
        kept = p * (real >= cut)
        share = kept / kept.sum()
        for value in descending.unique_consecutive().tolist():
            mass = share[real >= value].sum().item()
            margin[0] = min(margin[0], abs(mass - top_p))
            if mass >= top_p:
                cut = max(cut, value)
                break
    p = p * (real >= cut)
    return (p / p.sum()).tolist()


def draws(seed, position, row):
    """The accept test's uniform, three for a token of the target, three for one of the residual."""

    def uniforms(use, row):
        words = philox.block(seed, position, use | row << 8, 0)
        return [(word >> 8) * 2.0**-24 for word in words]

    return uniforms(1, row)[0], uniforms(3, 0)[:3], uniforms(2, row)[:3]


def decide(rule, p, q, drafts, uniforms, margin):
    """(drafts accepted, the token after them or None).

    p: probabilities of each row, lists; q: those beside each draft, or None for a bad row; drafts: None where there is
    none; uniforms(i): what `draws` gives.
    """
    count = len(drafts)

    def residual(ratio, i):
        return [max(ratio * a - b, 0.0) for a, b in zip(p[i], q[i])]

    def replaced(ratio, i):
        weights = residual(ratio, i)
        if sum(weights) < 1e-6:
            margin[0], weights = 0.0, p[i]
        return sample(weights, uniforms(i)[2], margin)

    if rule != BLOCK:
        for i, draft in enumerate(drafts):
            accept, token, _ = uniforms(i)
            if not any(p[i]):
                return i, None
            drawn = sample(p[i], token, margin) if draft is None or rule != REJECT or max(p[i]) == 1 else None
            if draft is None:
                return i, drawn
            if rule != REJECT or max(p[i]) == 1:
                if drawn != draft:
                    return i, drawn
                continue
            if q[i] is None:
                return i, sample(p[i], token, margin)
            below, above = accept * q[i][draft], p[i][draft]
            margin[0] = min(margin[0], abs(below / above - 1) if above else 1.0)
            if not below < above:
                return i, replaced(1.0, i)
        return count, sample(p[count], uniforms(count)[1], margin)

    useful = [i for i in range(count) if drafts[i] is None or q[i] is None or not any(p[i])]
    end = useful[0] if useful else count
    ratio, accepted, accepted_ratio = 1.0, 0, 1.0
    for i in range(1, end + 1):
        draft = drafts[i - 1]
        above, below = ratio * p[i - 1][draft], q[i - 1][draft]
        ratio = min(1.0, above / below) if below else float(above > 0)
        passing = ratio
        if i < end:
            mass = sum(residual(ratio, i))
            passing = mass / (mass + 1 - ratio) if mass + 1 - ratio > 1e-9 else 1.0
        margin[0] = min(margin[0], abs(uniforms(i - 1)[0] - passing))
        if uniforms(i - 1)[0] < passing:
            accepted, accepted_ratio = i, ratio
    if not any(p[accepted]):
        return accepted, None
    if accepted == end:
        return accepted, sample(p[accepted], uniforms(accepted)[1], margin)
    return accepted, replaced(accepted_ratio, accepted)


def partials(logits, temperature):
    """[rows, chunks, 2] in f64 of [rows, vocab] logits without NaN: greatest logit, sum of 2^(s logit - rint(s max))."""
    rows, vocab = logits.shape
    chunks = -(-vocab // 1024)
    padded = torch.full([rows, chunks * 1024], -torch.inf, dtype=torch.float64)
    padded[:, :vocab] = logits.double()
    padded = padded.view(rows, chunks, 1024)
    top = padded.amax(-1)
    scale = (math.log2(math.e) / temperature.double())[:, None, None]
    exponents = padded * scale - (top[..., None] * scale).round()
    return torch.stack([top, exponents.exp2().nansum(-1)], -1)
