"""Trains the emoji generator: python3 train.py --data emoji.npz --out weights [--seconds 480] [--smoke]

One GPU, some minutes; --smoke: a tiny model and a few steps on the CPU, and the same files. Phases share --seconds
out and follow the clock, so the end is known and the number of steps is not; the card has it. What torch.compile takes
minutes for, processes beside this one do at the start, while the tokenizer is trained as it is written. Writes tokenizer, var,
ar and draft.safetensors, golden.safetensors, card.md, and sheets of samples and reconstructions; and in `best` the
same from the transformers' weights of the least held-out loss.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from export import goldens, round_weights, tokenizer_tensors, transformer_tensors, write
from model import TINY, Config, Emoji, choose, sample_ar, sample_var

SHIFT = 3
# The centre, not mirrored.
PLAIN = (SHIFT * (2 * SHIFT + 1) + SHIFT) * 2
MOST_BYTES = 32_000_000
# Images that are encoded at a time.
ENCODED = 1024
# Text would be mirrored.
NEVER_MIRRORED = ("symbols", "flags")


class Clock:
    def __init__(self, seconds):
        self.start, self.seconds = time.monotonic(), seconds

    def now(self):
        return (time.monotonic() - self.start) / self.seconds

    def say(self, text):
        print(f"[{time.monotonic() - self.start:6.1f} s] {text}", flush=True)


class Data:
    """Images padded by white, so that a variant (shift, mirror) is a window."""

    def __init__(self, path, config, device, smoke):
        if path is None:
            packed = made_up(config)
        else:
            packed = dict(np.load(path))
        images = torch.from_numpy(packed["images"]).permute(0, 3, 1, 2)
        if images.shape[-1] != config.size:
            images = F.avg_pool2d(images.float(), images.shape[-1] // config.size).round().byte()
        if smoke:
            keep = np.random.default_rng(0).permutation(len(images))[:256]
            images, packed["labels"], packed["held_out"] = (
                images[keep],
                packed["labels"][keep],
                packed["held_out"][keep],
            )
        self.images = F.pad(images, (SHIFT,) * 4, value=255).to(device)
        self.size, self.device = config.size, device
        self.labels = torch.from_numpy(packed["labels"]).to(device)
        self.class_names, self.categories = packed["class_names"].tolist(), packed["categories"].tolist()
        self.class_categories = packed["class_categories"].tolist()
        held_out = torch.from_numpy(packed["held_out"])
        self.train, self.held_out = (~held_out).nonzero()[:, 0].to(device), held_out.nonzero()[:, 0].to(device)
        category = torch.tensor(self.class_categories, device=device)[self.labels]
        fixed = torch.tensor([name in NEVER_MIRRORED for name in self.categories], device=device)
        self.mirrors = (~fixed[category]).long()
        # Of the images that are trained on: by category, less unequally than they are.
        of_train = category[self.train]
        self.weights = torch.bincount(of_train, minlength=len(self.categories)).float().clamp(min=1).rsqrt()[of_train]
        self.class_counts = torch.bincount(self.labels[self.train], minlength=len(self.class_names)).tolist()

    def variants(self):
        return 2 * (2 * SHIFT + 1) ** 2

    def take(self, index, variant):
        """[batch, 3, size, size] from -1 to 1, channels last in memory."""
        mirror, shift = variant % 2 * self.mirrors[index], variant // 2
        dy, dx = shift // (2 * SHIFT + 1), shift % (2 * SHIFT + 1)
        along = torch.arange(self.size, device=self.device)
        columns = torch.where(mirror[:, None] == 1, self.size - 1 - along, along) + dx[:, None]
        rows = dy[:, None] + along
        images = self.images[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return (images.float() / 127.5 - 1).permute(0, 3, 1, 2)

    def encoded_variants(self):
        """Every other shift: encoding all would take too long."""
        side = 2 * SHIFT + 1
        return [2 * shift + mirror for shift in range(0, side * side, 2) for mirror in (0, 1)]

    def plain(self, index):
        return self.take(index, torch.full_like(index, PLAIN))

    def draw(self, batch):
        """Positions among the images that are trained on, and variants."""
        at = torch.multinomial(self.weights, batch, replacement=True)
        return at, torch.randint(self.variants(), (batch,), device=self.device)


def made_up(config):
    """Discs and squares, where there is no data: enough for a smoke test."""
    random = np.random.default_rng(5)
    y, x = np.mgrid[: config.size, : config.size] / config.size - 0.5
    images, labels = [], random.integers(0, 6, 128)
    for label in labels:
        inside = (np.abs(x) + np.abs(y) if label % 2 else np.hypot(x, y) * 1.3) < random.uniform(0.2, 0.5)
        images.append(np.where(inside[..., None], random.integers(0, 255, 3), 255).astype(np.uint8))
    return {
        "images": np.stack(images),
        "labels": labels.astype(np.int64),
        "held_out": np.arange(128) % 8 == 0,
        "class_names": np.array(["disc", "diamond", "ball", "tile", "coin", "kite"]),
        "class_categories": np.array([0, 0, 0, 1, 1, 1]),
        "categories": np.array(["shapes", "things"]),
    }


class Compiler:
    """torch.compile without waiting for it: a process of its own leaves what it made in the compiler's cache. Until it
    has ended, and if it failed, functions run as they are written."""

    PARTS = ("tokenizer", "tokens", "var", "ar")

    def __init__(self, clock, wanted):
        self.clock, self.processes, self.functions = clock, {}, {}
        if wanted:
            # A core or two for each.
            environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
            for part in self.PARTS:
                command = [sys.executable, *sys.argv, "--compile-only", part]
                self.processes[part] = subprocess.Popen(command, env=environment)

    def ready(self, part):
        return part in self.processes and self.processes[part].poll() == 0

    def run(self, part, function, *args):
        fast, tried = self.functions.get(part, (None, False))
        if fast is None and self.ready(part):
            fast, begun = torch.compile(function, dynamic=False), self.clock.now()
            try:
                out = fast(*args)
                loss = out[0] if isinstance(out, tuple) else out
                if torch.is_grad_enabled() and loss.requires_grad:
                    # Backwards is compiled when it is first run. It counts twice in this step.
                    loss.backward()
                    out = fast(*args)
                self.clock.say(f"{part}: compiled, {(self.clock.now() - begun) * self.clock.seconds:.1f} s")
            except Exception as error:  # No C compiler, no Triton: slower, but it trains.
                self.clock.say(f"{part}: not compiled: {type(error).__name__}: {str(error)[:200]}")
                fast, out = function, function(*args)
            self.functions[part] = (fast, True)
            return out
        return (fast or function)(*args)

    def end(self):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def autocast(device):
    return torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu")


def fit(
    name,
    modules,
    loss_of,
    clock,
    until,
    rate,
    device,
    steps=None,
    warm=0.02,
    decay=0.05,
    check=None,
    after=None,
    ema=None,
):
    """Steps of AdamW until the clock says `until`, or so many; loss_of(progress) gives a loss.

    ema: (module, decay): what `check` sees is the average of steps, and what the module ends with. Returns the number
    of steps and the average that `check` liked best: (score, step, state)."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=device != "cpu")
    average = copy.deepcopy(ema[0]).requires_grad_(False) if ema else None
    best, checked, said, step, begun = (math.inf, 0, None), 0.0, 0.0, 0, clock.now()
    while True:
        progress = step / steps if steps else (clock.now() - begun) / max(until - begun, 1e-9)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                rate
                * min(1.0, (step + 1) / 100, progress / warm + 0.02)
                * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
            )
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(progress)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if after:
            after(step, progress, optimizer)
        if ema:
            keep = min(ema[1], (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(ema[0].parameters()), 1 - keep)
        step += 1
        if step == 1:
            # What the first step took is not training.
            loss.item()
            begun = clock.now()
        if step == 1 or step % 16 == 0:
            # The host must not run far ahead: the clock is that of the GPU.
            value = loss.item()
            if not math.isfinite(value):
                raise SystemExit(f"{name}: the loss is {value} at step {step}")
            if progress >= said:
                clock.say(f"{name} step {step}: loss {value:.4f}")
                said = progress + 0.1
        if check and progress >= checked + 0.05:
            checked, score = progress, check(average)
            if score < best[0]:
                best = (score, step, {key: value.clone() for key, value in average.state_dict().items()})
    if check:
        score = check(average)
        clock.say(f"{name}: held out {score:.4f} at the end, {best[0]:.4f} at best (step {best[1]})")
        if score < best[0]:
            best = (score, step, average.state_dict())
        ema[0].load_state_dict(average.state_dict())
    clock.say(f"{name}: {step} steps")
    return step, best


def tokenizer_loss(model, device):
    """Of images: (loss, tokens, what was searched for)."""

    def loss_of_images(images):
        with autocast(device):
            f = model.encoder(images)
        with torch.autocast(device, enabled=False):
            tokens, f_hat, quantized, searched = model.quantizer.encode(f.float())
        with autocast(device):
            made = model.decoder(f_hat)
        made = made.float()
        edges = sum((made.diff(dim=d) - images.diff(dim=d)).abs().mean() for d in (2, 3))
        return (made - images).abs().mean() + F.mse_loss(made, images) + 0.5 * edges + quantized, tokens, searched

    return loss_of_images


def train_tokenizer(model, data, clock, compiler, until, batch, steps, device):
    quantizer = model.quantizer
    usage = torch.zeros(model.config.vocab, device=device)
    share = torch.full((batch * model.config.tokens,), 0.02, device=device)
    latest = {}
    loss_of_images = tokenizer_loss(model, device)

    def loss_of(progress):
        at, variant = data.draw(batch)
        images = data.take(data.train[at], variant)
        loss, latest["tokens"], latest["searched"] = compiler.run("tokenizer", loss_of_images, images)
        return loss

    @torch.no_grad()
    def after(step, progress, optimizer):
        # bincount would wait for the GPU.
        usage.mul_(0.98).index_add_(0, latest["tokens"].flatten(), share)
        if progress < 0.75 and step % 25 == 10:
            # Rows that are not used start again where the map is not yet met.
            unused = (usage < 0.02 * usage.mean()).nonzero()[:, 0]
            searched = latest["searched"].detach().flatten(0, 1)
            rows = searched[torch.randint(len(searched), (len(unused),), device=device)]
            quantizer.codebook[unused] = rows.to(quantizer.codebook.dtype)
            usage[unused] = usage.mean()
            for moment in optimizer.state[quantizer.codebook].values():
                if moment.ndim == 2:
                    moment[unused] = 0

    done, _ = fit(
        "tokenizer",
        [model.encoder, quantizer, model.decoder],
        loss_of,
        clock,
        until,
        1.0e-3,
        device,
        steps,
        after=after,
        decay=0.01,
    )
    clock.say(f"tokenizer: {int((usage > 0.02 * usage.mean()).sum())} of {len(usage)} codes in use")
    return done


@torch.no_grad()
def tokens_of(model, data, index, variants, device, compiler=None):
    """[images, variants, tokens] of int16."""
    out = torch.empty(len(index), len(variants), model.config.tokens, dtype=torch.int16, device=device)
    encode = encoding(model, device)
    for i, variant in enumerate(variants):
        for part in torch.arange(len(index), device=device).split(ENCODED):
            images = data.take(index[part], torch.full_like(part, variant))
            # Parts of one size are what is compiled.
            whole = compiler is not None and len(part) == ENCODED
            out[part, i] = compiler.run("tokens", encode, images) if whole else encode(images)
    return out


def encoding(model, device):
    """Of images: tokens."""

    def encode(images):
        with autocast(device):
            f = model.encoder(images)
        with torch.autocast(device, enabled=False):
            return model.quantizer.encode(f.float())[0].short()

    return encode


def rest_of(model, transformer, tokens):
    """What a transformer reads after the class."""
    return tokens[:, :-1] if transformer.causal else model.quantizer.chain(tokens)[0]


def transformer_loss(model, transformer, device, dropout, teacher=None):
    """Of tokens, classes, and what of these is said: the cross-entropy with the tokens, or with what a teacher says."""

    def loss_of_batch(tokens, label, keep_class, keep_category):
        with torch.no_grad(), torch.autocast(device, enabled=False):
            rest = rest_of(model, transformer, tokens)
        with autocast(device):
            logits = transformer(transformer.condition(label, keep_class, keep_category), rest, dropout)
            if teacher is None:
                return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            with torch.no_grad():
                right = teacher(teacher.condition(label, keep_class, keep_category), rest).softmax(-1)
        return F.cross_entropy(logits.flatten(0, 1), right.flatten(0, 1))

    return loss_of_batch


def train_transformer(
    name, model, data, tokens, held_out, clock, compiler, until, batch, rate, steps, device, dropout, teacher=None
):
    transformer = getattr(model, name)
    labels, label_held_out = data.labels[data.train], data.labels[data.held_out]
    loss_of_batch = transformer_loss(model, transformer, device, dropout, teacher)

    def loss_of(progress):
        at, variant = data.draw(batch)
        chance = torch.rand(batch, 2, device=device)
        said = (chance[:, 0] > 0.15).float(), chance[:, 1] > 0.1
        return compiler.run(name, loss_of_batch, tokens[at, variant % tokens.shape[1]].long(), labels[at], *said)

    @torch.no_grad()
    def check(average):
        with autocast(device):
            logits = average(average.condition(label_held_out), rest_of(model, average, held_out))
        return F.cross_entropy(logits.flatten(0, 1), held_out.flatten()).item()

    return fit(name, [transformer], loss_of, clock, until, rate, device, steps, check=check, ema=(transformer, 0.999))


def compile_only(part, model, data, config, args, device):
    """Calls what a phase calls, forwards and backwards, so that the compiler's cache has it. Tokens may be any."""
    at, variant = data.draw(ENCODED if part == "tokens" else args.batch[{"tokenizer": 0, "var": 1, "ar": 2}[part]])
    images = data.take(data.train[at], variant) if part in ("tokenizer", "tokens") else None
    if part == "tokenizer":
        torch.compile(tokenizer_loss(model, device), dynamic=False)(images)[0].backward()
        return
    model.requires_grad_(False)
    if part == "tokens":
        with torch.no_grad():
            torch.compile(encoding(model, device), dynamic=False)(images)
        return
    transformer, batch = getattr(model, part), len(at)
    transformer.requires_grad_(True)
    loss = torch.compile(transformer_loss(model, transformer, device, args.dropout), dynamic=False)
    tokens = torch.randint(config.vocab, (batch, config.tokens), dtype=torch.int16, device=device).long()
    chance = torch.rand(batch, 2, device=device)
    loss(tokens, data.labels[data.train][at], (chance[:, 0] > 0.15).float(), chance[:, 1] > 0.1).backward()


@torch.no_grad()
def measure(model, data, held_out, device):
    """Numbers for the card, of the rounded weights in f32."""
    quantizer, numbers, originals = model.quantizer, {}, data.plain(data.held_out)
    made = model.decoder(quantizer.chain(held_out)[1]).clamp(-1, 1)
    errors = ((made - originals) / 2).square().flatten(1).mean(1)
    numbers["psnr"] = (-10 * errors.log10()).mean().item()
    numbers["codes"] = len(held_out.unique())
    label, probabilities = data.labels[data.held_out], {}
    for name in ("var", "ar", "draft"):
        transformer = getattr(model, name)
        rest = held_out[:, :-1] if transformer.causal else quantizer.chain(held_out)[0]
        logits = transformer(transformer.condition(label), rest)
        numbers[f"{name} cross-entropy"] = F.cross_entropy(logits.flatten(0, 1), held_out.flatten()).item()
        probabilities[name] = logits.softmax(-1)
    numbers["acceptance"] = torch.minimum(probabilities["ar"], probabilities["draft"]).sum(-1).mean().item()
    return numbers, originals, made


@torch.no_grad()
def nearest(images, data):
    """L2 to the nearest image that was trained on, of each."""
    known = torch.cat([data.plain(part).flatten(1) for part in data.train.split(1024)])
    return torch.cdist(images.flatten(1).float(), known).amin(1)


def sheet(images, columns, path):
    try:
        from PIL import Image
    except ImportError:
        return np.save(path.with_suffix(".npy"), images.cpu().numpy())
    images = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = len(images) // columns
    size = images.shape[1]
    grid = (
        images[: rows * columns]
        .reshape(rows, columns, size, size, 3)
        .swapaxes(1, 2)
        .reshape(rows * size, columns * size, 3)
    )
    Image.fromarray(grid).save(path)


def labels_of(data, category, count, generator):
    """Classes of a category, as often as the square roots of their sizes."""
    weights = torch.tensor([c**0.5 if k == category else 0.0 for k, c in zip(data.class_categories, data.class_counts)])
    return torch.multinomial(weights, count, replacement=True, generator=generator).to(data.device)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="of data.py; without, --smoke makes shapes up")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480, help="for everything; 480")
    parser.add_argument("--steps", type=int, nargs=4, help="of tokenizer, var, ar and draft, in place of the clock")
    parser.add_argument("--batch", type=int, nargs=4, default=(128, 256, 256, 256))
    parser.add_argument(
        "--ends", type=float, nargs=4, default=(0.34, 0.74, 0.88, 0.94), help="of the phases, in parts of --seconds"
    )
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--narrow",
        action="store_true",
        help="the real shape with a quarter of the tokenizer's channels: to try training on a CPU",
    )
    parser.add_argument("--compile", action="store_true", help="also without a GPU")
    parser.add_argument("--compile-only", choices=Compiler.PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None and not args.smoke:
        parser.error("--data is missing")
    device = "cpu" if args.smoke or not torch.cuda.is_available() else "cuda"
    clock, config = Clock(args.seconds), TINY if args.smoke else Config()
    if args.narrow:
        config.decoder, config.encoder = (40, 32, 24, 16), (48, 40, 24)
        config.var, config.ar, config.draft = (128, 3), (64, 2), (64, 1)
    if args.smoke:
        # The same bytes on any machine's cores.
        torch.set_num_threads(1)
        args.steps, args.batch = args.steps or (60, 60, 40, 40), (16,) * 4
    steps = args.steps or (None,) * 4
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    data = Data(args.data, config, device, args.smoke)
    model = Emoji(config, data.class_categories).to(device)
    for part in (model.encoder, model.decoder):
        part.to(memory_format=torch.channels_last)
    if args.compile_only:
        return compile_only(args.compile_only, model, data, config, args, device)
    compiler = Compiler(clock, args.compile or device == "cuda")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    clock.say(
        f"{name}, torch {torch.__version__}: {len(data.train)} images, {len(data.held_out)} held out,"
        f" {len(data.class_names)} classes"
    )

    done, best = [train_tokenizer(model, data, clock, compiler, args.ends[0], args.batch[0], steps[0], device)], {}
    model.requires_grad_(False)
    variants = data.encoded_variants() if not (args.smoke or args.narrow) else [PLAIN, PLAIN + 1]
    tokens = tokens_of(model, data, data.train, variants, device, compiler)
    held_out = tokens_of(model, data, data.held_out, [PLAIN], device)[:, 0].long()
    clock.say(f"tokens of {len(tokens)} images in {tokens.shape[1]} variants")
    for i, (part, rate) in enumerate((("var", 1e-3), ("ar", 1e-3), ("draft", 2e-3)), 1):
        torch.manual_seed(args.seed + i)
        getattr(model, part).requires_grad_(True)
        teacher = model.ar if part == "draft" else None
        dropout = args.dropout if part != "draft" else 0.0
        count, best[part] = train_transformer(
            part,
            model,
            data,
            tokens,
            held_out,
            clock,
            compiler,
            args.ends[i],
            args.batch[i],
            rate,
            steps[i],
            device,
            dropout,
            teacher,
        )
        done.append(count)
        getattr(model, part).requires_grad_(False)
    compiler.end()

    if args.smoke:
        # Parameters that begin at zero must not be near it in a test.
        torch.manual_seed(args.seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.ndim < 4 else 0.02))
    finish(args, args.out, config, model, data, done, device, name, clock)
    if not args.smoke:
        # Once more from the weights of the least held-out loss: less like what was trained on, and less well drawn.
        for part in ("var", "ar"):
            done[1 + ("var", "ar").index(part)] = best[part][1]
            getattr(model, part).load_state_dict(best[part][2])
        (args.out / "best").mkdir(exist_ok=True)
        finish(args, args.out / "best", config, model, data, done, device, name, clock)


@torch.no_grad()
def finish(args, out, config, model, data, done, device, name, clock):
    """Rounds, measures and writes everything."""
    round_weights(model)
    held_out = tokens_of(model, data, data.held_out, [PLAIN], device)[:, 0].long()
    numbers, originals, made = measure(model, data, held_out, device)
    clock.say(json.dumps(numbers))

    metadata = {
        "format": "nextscale-emoji-1",
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.dict().items()},
    }
    metadata["licence"] = "trained on Noto emoji (Google, Apache-2.0)"
    classes = {
        "categories": data.categories,
        "names": data.class_names,
        "category_of": data.class_categories,
        "counts": data.class_counts,
    }
    sizes = {
        "tokenizer": write(
            out / "tokenizer.safetensors",
            tokenizer_tensors(model),
            {**metadata, "part": "tokenizer", "classes": classes},
        )
    }
    for part in ("var", "ar", "draft"):
        sizes[part] = write(
            out / f"{part}.safetensors", transformer_tensors(getattr(model, part)), {**metadata, "part": part}
        )
    on_cpu = copy.deepcopy(model).cpu()
    rows = sorted({0, 1, 4, config.tokens // 2, config.tokens - 2, config.tokens - 1})
    index = data.held_out[:1]
    golden = goldens(on_cpu, data.plain(index)[0].cpu().float(), int(data.labels[index]), rows)
    sizes["golden"] = write(out / "golden.safetensors", golden, {**metadata, "part": "golden"})
    assert sum(sizes.values()) <= MOST_BYTES, sizes
    clock.say(f"written: {sizes}")

    pairs = (
        torch.stack([originals[:12], made[:12], originals[12:24], made[12:24]]).flatten(0, 1)
        if len(made) >= 24
        else made
    )
    sheet(pairs, 12 if len(made) >= 24 else len(made), out / "reconstructions.png")
    generator, chosen = torch.Generator(device).manual_seed(args.seed), torch.Generator().manual_seed(args.seed)
    labels = torch.cat([labels_of(data, category, 12, chosen) for category in range(len(data.categories))])
    drawn = {}
    for title, sampler, guidance in (
        ("var", sample_var, 1.0),
        ("var", sample_var, 2.0),
        ("var", sample_var, 3.5),
        ("ar", sample_ar, 2.0),
    ):
        with autocast(device):
            f_hat = sampler(model, labels, guidance=guidance, top_k=min(200, config.vocab), generator=generator)[1]
        drawn[f"{title}-{guidance}"] = images = model.decoder(f_hat.float()).clamp(-1, 1)
        sheet(images, 12, out / f"{title}-guidance-{guidance}.png")
    novelty = {title: nearest(images, data).median().item() for title, images in drawn.items()}
    novelty["held out"] = nearest(originals, data).median().item()
    clock.say(f"samples drawn; median L2 to the nearest image that was trained on: {novelty}")
    write_card(args, out, config, data, done, sizes, numbers, novelty, name, clock)


def write_card(args, out, config, data, done, sizes, numbers, novelty, device, clock):
    row = lambda *cells: "| " + " | ".join(str(cell) for cell in cells) + " |"
    shape = lambda shape: f"width {shape[0]}, {shape[1]} layers"
    parts = (
        (
            "tokenizer",
            f"{config.size} px to {config.side} x {config.side}, {config.vocab} codes of {config.channels},"
            f" scales {config.scales}",
            "",
        ),
        ("var", shape(config.var), f"{numbers['var cross-entropy']:.3f}"),
        ("ar", shape(config.ar), f"{numbers['ar cross-entropy']:.3f}"),
        ("draft", shape(config.draft), f"{numbers['draft cross-entropy']:.3f}"),
    )
    text = [
        "# Emoji generator: model card\n",
        "Class-conditional next-scale and next-token models of 64-pixel emoji. Made by `python-ref/emoji/train.py`.\n",
        row("model", "shape", "steps", "batch", "bytes", "held-out cross-entropy"),
        row(*["---"] * 6),
        *(row(part, what, done[i], args.batch[i], sizes[part], loss) for i, (part, what, loss) in enumerate(parts)),
        "",
        f"- Reconstruction of {len(data.held_out)} held-out images: {numbers['psnr']:.2f} dB PSNR (mean over images),"
        f" {numbers['codes']} codes in use.",
        f"- The draft is accepted with probability {numbers['acceptance']:.3f} a token on held-out images (temperature 1,"
        " no truncation, no guidance).",
        "- Median L2 (pixels from -1 to 1) to the nearest training image: "
        + ", ".join(f"{k} {v:.1f}" for k, v in novelty.items())
        + ".",
        f"- Seed {args.seed}; {device}, torch {torch.__version__}, bf16 autocast; {clock.now() * clock.seconds:.0f} s in"
        " all. Training follows the"
        f" clock; `--steps {' '.join(map(str, done))}` takes the same number of steps.",
        f"- Data: `emoji-datasource-google` 16.0.0 from npm, {len(data.train)} images trained on,"
        f" {len(data.held_out)} held out (whole emoji with all skin"
        " tones). Weights are averages over steps (decay 0.999), rounded to f16.",
        "- Licence of the images: Apache-2.0, Google's Noto emoji. Weights: MIT or Apache-2.0, as the project.",
    ]
    (out / "card.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
