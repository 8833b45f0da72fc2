"""Multi-scale residual quantizers, bits and FSQ, in f64 by PyTorch's own operators.

Maps are [batch, channels, height, width]; tokens of a scale are codes [batch, l], or embeddings or bits [batch, l, width].
"""

import torch
import torch.nn.functional as F


def grid(tokens, size, codebook=None, bits=False, bit_scale=None, patch=1):
    """The map of one scale's tokens; `size` is its grid of tokens."""
    if codebook is not None:
        x = codebook.double()[tokens.long()]
    elif bits:
        # As f32, which it is on both sides.
        scale = torch.tensor(bit_scale, dtype=torch.float32).double()
        x = torch.where(tokens != 0, scale, -scale)
    else:
        x = tokens.double()
    x = x.transpose(1, 2).reshape(x.shape[0], -1, *size)
    return F.pixel_shuffle(x, patch) if patch > 1 else x


def token_major(x, patch=1):
    x = F.pixel_unshuffle(x, patch) if patch > 1 else x
    return x.flatten(2).transpose(1, 2)


def resize(x, size, mode):
    how = {} if mode == "area" else {"align_corners": False}
    return F.interpolate(x, size=size, mode=mode, **how)


def phi(h, weight, bias, ratio):
    return h * (1 - ratio) + F.conv2d(h, weight.double(), bias.double(), padding=1) * ratio


class Quantizer:
    """schedule: [(height, width)] in tokens. phis: None, or (weights, biases, ratio, table). next: area, bilinear, tokens."""

    def __init__(self, schedule, up="bicubic", next="area", phis=None, last_phi=True, patch=1, bit_scale=None):
        self.schedule, self.up, self.next, self.phis = schedule, up, next, phis
        self.last_phi, self.patch, self.bit_scale = last_phi, patch, bit_scale
        self.size = tuple(side * patch for side in schedule[-1])
        self.starts = [0]
        for height, width in schedule:
            self.starts.append(self.starts[-1] + height * width)

    def pixels(self, scale):
        return tuple(side * self.patch for side in self.schedule[scale])

    def of_scale(self, tokens, scale):
        return tokens[:, self.starts[scale] : self.starts[scale + 1]]

    def added(self, x, scale):
        """What the map of a scale's tokens adds to the running map."""
        h = resize(x, self.size, self.up)
        if self.phis is None or (scale + 1 == len(self.schedule) and not self.last_phi):
            return h
        weights, biases, ratio, table = self.phis
        return phi(h, weights[table[scale]], biases[table[scale]], ratio)

    def chain(self, tokens, codebook=None, bits=False):
        """(maps after each scale, inputs of scales 1 and up)"""
        f_hat, maps, inputs = 0, [], []
        for scale, size in enumerate(self.schedule):
            x = grid(self.of_scale(tokens, scale), size, codebook, bits, self.bit_scale, self.patch)
            f_hat = self.added(x, scale) + (0 if self.next == "tokens" else f_hat)
            maps.append(f_hat)
            if scale + 1 < len(self.schedule):
                of = (x, self.up) if self.next == "tokens" else (f_hat, self.next)
                inputs.append(token_major(resize(of[0], self.pixels(scale + 1), of[1]), self.patch))
        return maps, inputs

    def left(self, f, f_hat, scale):
        """What the scales so far have left of a map, as one scale's tokens see it."""
        return token_major(resize(f.double() - f_hat, self.pixels(scale), "area"), self.patch)


def fsq_level(z, levels, bound):
    """What is rounded to a level, in f64; levels are [dim]."""
    levels = levels.double()
    if bound == "tanh":
        half, offset = (levels - 1) * (1 + 1e-3) / 2, torch.where(levels % 2 == 0, 0.5, 0.0).double()
        return (z + (offset / half).atanh()).tanh() * half - offset + levels.div(2, rounding_mode="floor")
    bounded = z.tanh() if bound == "symmetric" else z.clamp(-1, 1)
    return (levels - 1) * (bounded + 1) / 2


def fsq_value(level, levels, bound):
    levels = levels.double()
    if bound == "tanh":
        halves = levels.div(2, rounding_mode="floor")
        return (level - halves) / halves
    return 2 * level / (levels - 1) - 1
