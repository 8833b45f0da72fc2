"""The emoji models: a multi-scale residual tokenizer and three class-conditional transformers over its tokens.

What the library computes is written here as the library defines it: resizing, phi and adding up as
`quantization::MultiScale`, l2-normed attention over scales as `attention::{Prepare, ScaleAttention}` (VAR, arXiv
2404.02905). Resizes are dense matrices: torch's bicubic is slow backwards. Tokens are [batch, all scales], maps
[batch, channels, side, side], images [batch, 3, size, size] from -1 to 1.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class Config:
    size: int = 64
    scales: tuple = (1, 2, 3, 4, 6, 8)
    phi_table: tuple = (0, 0, 1, 2, 3, 3)
    channels: int = 32
    vocab: int = 1024
    # Channels of the stages, from the latent's side up, and residual blocks of each.
    decoder: tuple = (160, 128, 96, 64)
    decoder_blocks: tuple = (2, 2, 2, 1)
    # Its first stage has half of the image's side: it is not shipped, and the sides of 64 would take most of the time.
    encoder: tuple = (192, 160, 128)
    head_dim: int = 64
    mlp: int = 4
    # Width and depth.
    var: tuple = (256, 10)
    ar: tuple = (192, 6)
    draft: tuple = (128, 2)

    @property
    def side(self):
        return self.scales[-1]

    @property
    def starts(self):
        starts = [0]
        for scale in self.scales:
            starts.append(starts[-1] + scale * scale)
        return starts

    @property
    def tokens(self):
        return self.starts[-1]

    dict = asdict


# Every part of the real one, small enough for a test's fixture.
TINY = Config(
    size=16,
    scales=(1, 2, 3, 4),
    phi_table=(0, 0, 1, 1),
    channels=8,
    vocab=32,
    decoder=(16, 12, 8),
    decoder_blocks=(1, 1, 1),
    encoder=(16, 12),
    head_dim=16,
    mlp=2,
    var=(32, 2),
    ar=(32, 2),
    draft=(16, 1),
)


def bicubic_matrix(source, target):
    """[target, source]: F.interpolate(mode="bicubic", align_corners=False) along one axis."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    a = -0.75
    near = lambda s: ((a + 2) * s - (a + 3)) * s * s + 1
    far = lambda s: ((a * s - 5 * a) * s + 8 * a) * s - 4 * a
    for to in range(target):
        at = (to + 0.5) * source / target - 0.5
        first, t = math.floor(at), at - math.floor(at)
        if source == target:
            matrix[to, to] = 1
            continue
        for tap, weight in zip((-1, 0, 1, 2), (far(t + 1), near(t), near(1 - t), far(2 - t))):
            matrix[to, min(max(first + tap, 0), source - 1)] += weight
    return matrix


def area_matrix(source, target):
    """[target, source]: F.interpolate(mode="area") along one axis."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for to in range(target):
        first, end = to * source // target, -(-(to + 1) * source // target)
        matrix[to, first:end] = 1 / (end - first)
    return matrix


def modulated(x, scale, shift):
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Quantizer(nn.Module):
    RATIO = 0.5

    def __init__(self, config):
        super().__init__()
        self.config, side, channels = config, config.side, config.channels
        self.codebook = nn.Parameter(torch.randn(config.vocab, channels) * 0.5)
        self.phis = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(max(config.phi_table) + 1))
        for k, scale in enumerate(config.scales):
            up, area = bicubic_matrix(scale, side), area_matrix(side, scale)
            self.register_buffer(f"up{k}", torch.kron(up, up).float(), persistent=False)
            self.register_buffer(f"area{k}", torch.kron(area, area).float(), persistent=False)

    def added(self, rows, k):
        """What the embeddings of scale k, [batch, l, channels], add to the map."""
        h = torch.matmul(getattr(self, f"up{k}"), rows).transpose(1, 2).unflatten(2, (self.config.side,) * 2)
        return h * (1 - self.RATIO) + self.phis[self.config.phi_table[k]](h) * self.RATIO

    def pooled(self, f, k):
        """[batch, l, channels]"""
        return torch.matmul(getattr(self, f"area{k}"), f.flatten(2).transpose(1, 2))

    def nearest(self, z):
        distance = self.codebook.square().sum(1) - 2 * z @ self.codebook.T
        return distance.argmin(-1)

    def encode(self, f):
        """Tokens; the map that they add up to, straight-through; codebook and encoder loss; what was searched for."""
        f_hat, loss, tokens, searched = torch.zeros_like(f), 0.0, [], []
        target = f.detach()
        for k in range(len(self.config.scales)):
            z = self.pooled(target - f_hat.detach(), k)
            codes = self.nearest(z)
            f_hat = f_hat + self.added(self.codebook[codes], k)
            loss = loss + F.mse_loss(f_hat, target) + 0.25 * F.mse_loss(f, f_hat.detach())
            tokens.append(codes)
            searched.append(z)
        loss = loss / len(self.config.scales)
        return torch.cat(tokens, 1), f + (f_hat - f).detach(), loss, torch.cat(searched, 1)

    def chain(self, tokens):
        """The inputs of the scales after the first, [batch, tokens - 1, channels], and the last map."""
        starts, f_hat, inputs = self.config.starts, 0, []
        for k in range(len(self.config.scales)):
            f_hat = f_hat + self.added(self.codebook[tokens[:, starts[k] : starts[k + 1]]], k)
            if k + 1 < len(self.config.scales):
                inputs.append(self.pooled(f_hat, k + 1))
        return torch.cat(inputs, 1), f_hat


class Norm(nn.Module):
    """Over the channels of each pixel, then SiLU."""

    def __init__(self, channels):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.silu(modulated(x.permute(0, 2, 3, 1), self.scale, self.shift)).permute(0, 3, 1, 2)


def conv(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.conv1 = Norm(channels), conv(channels, channels)
        self.norm2, self.conv2 = Norm(channels), conv(channels, channels)
        nn.init.normal_(self.conv2.weight, std=0.2 / math.sqrt(9 * channels))

    def forward(self, x):
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x))))


class Resample(nn.Module):
    """To the next stage's channels, twice or half the side."""

    def __init__(self, inputs, outputs, up):
        super().__init__()
        self.up, self.norm, self.conv = up, Norm(inputs), conv(inputs, outputs, 1 if up else 2)

    def forward(self, x):
        x = self.norm(x)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Encoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.encoder[::-1]
        layers = [nn.PixelUnshuffle(2), conv(12, widths[0])]
        for i, width in enumerate(widths):
            layers += [Block(width), Block(width)]
            layers += [Resample(width, widths[i + 1], up=False)] if i + 1 < len(widths) else []
        self.layers = nn.Sequential(*layers, Norm(widths[-1]), nn.Conv2d(widths[-1], config.channels, 1))

    def forward(self, images):
        return self.layers(images)


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        widths = config.decoder
        layers = [conv(config.channels, widths[0])]
        for i, width in enumerate(widths):
            layers += [Block(width) for _ in range(config.decoder_blocks[i])]
            layers += [Resample(width, widths[i + 1], up=True)] if i + 1 < len(widths) else []
        self.layers = nn.Sequential(*layers, Norm(widths[-1]))
        self.out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, f_hat):
        return self.out(self.layers(f_hat))


class Layer(nn.Module):
    def __init__(self, width, depth, head_dim, mlp):
        super().__init__()
        self.heads = width // head_dim
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.qkv, self.out = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, mlp * width), linear(mlp * width, width)
        # Of gate, scale, shift before attention, then of those before the MLP: added to what the class says.
        self.modulation = nn.Parameter(torch.tensor([1.0, 0, 0, 1, 0, 0])[:, None].repeat(1, width))
        self.multiplier = nn.Parameter(torch.full((self.heads,), math.log(4.0)))
        for weight, std in (
            (self.qkv, 1),
            (self.up, 1),
            (self.out, 0.7 / math.sqrt(depth)),
            (self.down, 0.7 / math.sqrt(depth)),
        ):
            nn.init.trunc_normal_(weight.weight, std=std * 0.6 / math.sqrt(weight.in_features))

    def attend(self, h, mask, cache=None):
        """mask: None, [tokens, tokens] of what is seen, or "causal"."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q = F.normalize(q, dim=-1) * self.multiplier.clamp(max=math.log(100.0)).exp().to(q.dtype)[:, None, None]
        k = F.normalize(k, dim=-1)
        if cache is not None:
            cache.append((k, v) if not cache else tuple(torch.cat(pair, 2) for pair in zip(cache.pop(), (k, v))))
            k, v = cache[0]
        how = {"is_causal": True} if isinstance(mask, str) else {"attn_mask": mask}
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=1.0, **how).transpose(1, 2).flatten(2))

    def forward(self, x, said, mask, dropout, cache=None):
        gate1, scale1, shift1, gate2, scale2, shift2 = (said + self.modulation)[:, :, None].unbind(1)
        x = x + gate1 * F.dropout(self.attend(modulated(x, scale1, shift1), mask, cache), dropout)
        h = F.gelu(self.up(modulated(x, scale2, shift2)), approximate="tanh")
        return x + gate2 * F.dropout(self.down(h), dropout)


class Transformer(nn.Module):
    """Of VAR, if `causal` is false: a scale at a time, from the map so far. Else one token after the other."""

    def __init__(self, config, shape, class_categories, causal):
        super().__init__()
        (width, depth), self.config, self.causal = shape, config, causal
        self.width = width
        categories = int(max(class_categories)) + 1
        # Row 0: nothing is said. Then categories, then classes, which are added to their categories.
        self.conditions = nn.Parameter(torch.randn(1 + categories + len(class_categories), width) * 0.3)
        self.register_buffer("category_of", torch.as_tensor(class_categories).long(), persistent=False)
        self.classes_from = 1 + categories
        self.positions = nn.Parameter(torch.randn(config.tokens, width) * 0.05)
        self.embed = nn.Linear(config.vocab if causal else config.channels, width, bias=False)
        nn.init.normal_(self.embed.weight, std=0.3 if causal else 0.3 / math.sqrt(config.channels))
        self.modulation = nn.Linear(width, 6 * width, bias=False)
        nn.init.zeros_(self.modulation.weight)
        self.layers = nn.ModuleList(Layer(width, depth, config.head_dim, config.mlp) for _ in range(depth))
        self.head_modulation = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.head_modulation.weight)
        nn.init.zeros_(self.head_modulation.bias)
        self.head = nn.Linear(width, config.vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        starts = torch.tensor(config.starts)
        place = torch.arange(config.tokens)
        scale = torch.bucketize(place, starts[1:], right=True)
        self.register_buffer("visible", scale[:, None] >= scale[None, :], persistent=False)

    def condition(self, labels, keep_class=None, keep_category=None):
        """labels: classes. What is not kept is not said; then of the category alone, or of nothing."""
        category = self.conditions[1 + self.category_of[labels]]
        own = self.conditions[self.classes_from + labels]
        if keep_class is None:
            return category + own
        said = category + own * keep_class[:, None]
        return torch.where(keep_category[:, None], said, self.conditions[0])

    def table(self):
        """What the engine takes conditions from: nothing, categories, classes."""
        classes = torch.arange(len(self.category_of), device=self.conditions.device)
        return torch.cat([self.conditions[: self.classes_from], self.condition(classes)])

    def inputs(self, condition, rest):
        """rest: VAR's inputs of later scales, or the tokens before the last."""
        rest = F.embedding(rest, self.embed.weight.T) if self.causal else self.embed(rest)
        return torch.cat([condition[:, None].to(rest.dtype), rest], 1) + self.positions

    def run(self, x, condition, mask, dropout=0.0, caches=None):
        said = F.silu(condition)
        scale_shift = self.modulation(said).unflatten(1, (6, -1))
        for i, layer in enumerate(self.layers):
            x = layer(x, scale_shift, mask, dropout, None if caches is None else caches[i])
        scale, shift = self.head_modulation(said)[:, None].chunk(2, -1)
        return self.head(modulated(x, scale, shift)).float()

    def forward(self, condition, rest, dropout=0.0):
        """Logits of all tokens, [batch, tokens, vocab]."""
        return self.run(self.inputs(condition, rest), condition, "causal" if self.causal else self.visible, dropout)


class Emoji(nn.Module):
    """All of it."""

    def __init__(self, config, class_categories):
        super().__init__()
        self.config = config
        self.encoder, self.quantizer, self.decoder = Encoder(config), Quantizer(config), Decoder(config)
        self.var = Transformer(config, config.var, class_categories, causal=False)
        self.ar = Transformer(config, config.ar, class_categories, causal=True)
        self.draft = Transformer(config, config.draft, class_categories, causal=True)


def choose(logits, top_k, top_p, generator):
    """One token a row of [rows, vocab]."""
    logits, order = logits.sort(-1, descending=True)
    probabilities = logits.softmax(-1)
    drop = (probabilities.cumsum(-1) - probabilities) >= top_p
    drop[:, top_k:] = True
    probabilities = probabilities.masked_fill(drop, 0)
    return order.gather(1, torch.multinomial(probabilities, 1, generator=generator))[:, 0]


@torch.no_grad()
def sample_var(model, labels, guidance=2.0, top_k=200, top_p=0.95, generator=None, run=None):
    """Tokens of a batch, a scale at a time with a cache; labels are classes. `run`: a compiled Transformer.run."""
    var, quantizer, config, batch = model.var, model.quantizer, model.config, len(labels)
    run = run or var.run
    condition = torch.cat([var.condition(labels), var.conditions[:1].expand(batch, -1)])
    x, f_hat, tokens, caches = condition[:, None], 0, [], [[] for _ in var.layers]
    for k in range(len(config.scales)):
        first, end = config.starts[k], config.starts[k + 1]
        logits = run(x + var.positions[first:end], condition, None, caches=caches)
        logits = (1 + guidance) * logits[:batch] - guidance * logits[batch:]
        codes = choose(logits.flatten(0, 1), top_k, top_p, generator).view(batch, -1)
        tokens.append(codes)
        f_hat = f_hat + quantizer.added(quantizer.codebook[codes], k)
        if k + 1 < len(config.scales):
            x = var.embed(quantizer.pooled(f_hat, k + 1).repeat(2, 1, 1))
    return torch.cat(tokens, 1), f_hat


@torch.no_grad()
def sample_ar(model, labels, guidance=2.0, top_k=200, top_p=0.95, generator=None):
    ar, config, batch = model.ar, model.config, len(labels)
    condition = torch.cat([ar.condition(labels), ar.conditions[:1].expand(batch, -1)])
    x, tokens, caches = condition[:, None], [], [[] for _ in ar.layers]
    for t in range(config.tokens):
        logits = ar.run(x + ar.positions[t], condition, None, caches=caches)[:, 0]
        logits = (1 + guidance) * logits[:batch] - guidance * logits[batch:]
        tokens.append(choose(logits, top_k, top_p, generator))
        x = F.embedding(tokens[-1].repeat(2), ar.embed.weight.T)[:, None]
    tokens = torch.stack(tokens, 1)
    return tokens, model.quantizer.chain(tokens)[1]
