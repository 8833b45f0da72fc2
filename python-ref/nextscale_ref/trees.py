"""Verification and building of trees of drafts in f64, from the definitions, with the draws that nextscale documents."""

import math

from nextscale_ref import philox, verification

GREEDY, MATCH, REJECT = range(3)


def accept_draw(seed, position, depth, child):
    """The uniform of the test of a node's child number `child`; the node is at `depth`."""
    return (philox.block(seed, position + depth, 1 | depth << 8, child)[0] >> 8) * 2.0**-24


def walk(rule, p, q, children, token, max_depth, distinct, draws, accept, margin):
    """(path of nodes from the root on, the token after it or None).

    p(node): probabilities of the target, a list. q(node): those that its children were drawn from; None: not at random.
    children(node): in the order of trial; token(node). draws(node, depth): (three for a token of the target, three for one of
    the residual). accept(node, depth, child, number): the uniform of a child's test. margin[0]: how close a choice was.
    """
    path = [0]
    while True:
        node, depth = path[-1], len(path) - 1
        of_target = p(node)
        if not any(of_target):
            return path, None
        peak = sum(weight > 0 for weight in of_target) == 1
        tries = children(node) if depth < max_depth else []
        of_draft = q(node) if rule == REJECT and not peak and tries else None
        for_token, for_residual = draws(node, depth)
        if of_draft is None:
            drawn = verification.sample(of_target, for_token, margin)
            onward = next((child for child in tries if token(child) == drawn), None)
            if onward is None:
                return path, drawn
            path.append(onward)
            continue
        left, rest, tried, share, onward = list(of_target), list(of_draft), [], 1.0, None
        for number, child in enumerate(tries):
            x = token(child)
            if of_draft[x] == 0 or (distinct and x in tried):
                if of_target[x] > 0 and x not in tried:
                    onward = child
                    break
                continue
            tested = accept(node, depth, child, number) * rest[x]
            if left[x] > 0:
                margin[0] = min(margin[0], abs(tested / left[x] - 1) * share)
            if tested < left[x]:
                onward = child
                break
            tried.append(x)
            left = [max(a - b, 0.0) for a, b in zip(left, rest)]
            mass = math.fsum(left)
            # Errors grow as less is left.
            share *= mass
            if share < 1e-4:
                margin[0] = 0.0
                return path, verification.sample(of_target, for_residual, margin)
            left = [weight / mass for weight in left]
            if distinct:
                rest[x] = 0.0
                mass = math.fsum(rest)
                rest = [weight / mass for weight in rest] if mass > 0 else rest
        if onward is not None:
            path.append(onward)
            continue
        if not tried:
            return path, verification.sample(of_target, for_token, margin)
        close = [1.0]
        drawn = verification.sample(left, for_residual, close)
        margin[0] = min(margin[0], close[0] * share)
        return path, drawn


def paths_of(parents, max_depth):
    """Of each candidate the path from the root, itself included; None where there is no node."""
    paths = [[0]] if parents else []
    for node, parent in list(enumerate(parents))[1:]:
        above = paths[parent] if 0 <= parent < node else None
        paths.append(above + [node] if above and len(above) <= max_depth else None)
    return paths


def choose(parents, scores, nodes, max_depth, sums):
    """The candidates that are chosen, ascending. Scores are f32 numbers; sums are made in f32."""
    import struct

    def f32(x):
        return struct.unpack("f", struct.pack("f", x))[0]

    def least(path):
        value, worst = 0.0, math.inf
        for node in path[1:]:
            value = scores[node] if sums else f32(value + scores[node])
            value = -math.inf if math.isnan(value) else value
            worst = min(worst, value)
        return worst

    paths = paths_of(parents, max_depth)
    known = [node for node, path in enumerate(paths) if path]
    return sorted(sorted(known, key=lambda node: (-least(paths[node]), node))[:nodes])
