"""Times the emoji model in PyTorch, in f16 on one GPU, beside the engine: peer.py [--batch 1 16] [--repeat 50]

The same work as `emoji --repeat`: classes to pixels, with guidance, top-k and top-p. Weights are random, which costs
the same time. Prints medians: eager, with stages timed apart (each waited for), and compiled, with and without CUDA
graphs.
"""

import argparse
import statistics
import time

import torch

from model import Config, Emoji, choose, sample_var


class Stages:
    def __init__(self):
        self.took, self.last = {}, None

    def begin(self):
        torch.cuda.synchronize()
        self.last = time.perf_counter()

    def end(self, name):
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.took[name] = self.took.get(name, 0.0) + (now - self.last) * 1e3
        self.last = now


@torch.no_grad()
def by_stage(model, labels, stages, guidance=2.0, top_k=200, top_p=0.95):
    """sample_var and the decoder, stage by stage."""
    var, quantizer, config, batch = model.var, model.quantizer, model.config, len(labels)
    stages.begin()
    condition = torch.cat([var.condition(labels), var.conditions[:1].expand(batch, -1)])
    x, f_hat, caches = condition[:, None], 0, [[] for _ in var.layers]
    for k in range(len(config.scales)):
        first, end = config.starts[k], config.starts[k + 1]
        logits = var.run(x + var.positions[first:end], condition, None, caches=caches)
        stages.end("transformer")
        logits = (1 + guidance) * logits[:batch] - guidance * logits[batch:]
        codes = choose(logits.flatten(0, 1), top_k, top_p, None).view(batch, -1)
        stages.end("sampling")
        f_hat = f_hat + quantizer.added(quantizer.codebook[codes], k)
        pooled = quantizer.pooled(f_hat, k + 1) if k + 1 < len(config.scales) else None
        stages.end("multi-scale step")
        x = var.embed(pooled.repeat(2, 1, 1)) if pooled is not None else None
    model.decoder(f_hat)
    stages.end("decoder")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    config = Config()
    model = Emoji(config, [0, 0, 1, 2, 3, 4, 5, 6, 7, 8] * 9 + [8] * 8).cuda().half().requires_grad_(False)
    model.decoder.to(memory_format=torch.channels_last)

    def whole(labels):
        return model.decoder(sample_var(model, labels)[1])

    def median(function, labels):
        for _ in range(5):
            function(labels)
        times = []
        for _ in range(args.repeat):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            function(labels)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(times)

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, f16")
    ways = {"eager": lambda: whole, "compiled": lambda: torch.compile(whole, dynamic=False)}
    ways["compiled, CUDA graphs"] = lambda: torch.compile(whole, dynamic=False, mode="reduce-overhead")
    for batch in args.batch:
        labels = torch.arange(batch, device="cuda")
        for name, way in ways.items():
            try:
                ms = median(way(), labels)
                print(
                    f"{name}: {ms:.3f} ms a batch of {batch}, {ms / batch:.3f} ms an image (median of {args.repeat})",
                    flush=True,
                )
            except Exception as error:  # A way that this torch does not go is said, not hidden.
                print(f"{name}, batch {batch}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        runs = []
        for _ in range(args.repeat):
            stages = Stages()
            by_stage(model, labels, stages)
            runs.append(stages.took)
        print(
            "eager by stage:",
            ", ".join(f"{name} {statistics.median(r[name] for r in runs):.3f} ms" for name in runs[0]),
            flush=True,
        )


if __name__ == "__main__":
    main()
