"""From models to what the engine loads: safetensors in f16 with a checksum, and goldens of exactly those weights."""

import json
import struct
import zlib

import torch


def decoder_tensors(decoder, config):
    """Convolutions as [output, 9 * input], taps before channels: the order in which the engine unfolds."""
    tensors, layers, at = {}, list(decoder.layers), 0
    flat = lambda conv: conv.weight.permute(0, 2, 3, 1).flatten(1)

    def norm(name, norm):
        tensors[f"{name}.scale"], tensors[f"{name}.shift"] = norm.scale, norm.shift

    tensors["decoder.in"] = flat(layers[0])
    for stage in range(len(config.decoder)):
        for block in range(config.decoder_blocks[stage]):
            at += 1
            for i in (1, 2):
                norm(f"decoder.{stage}.{block}.norm{i}", getattr(layers[at], f"norm{i}"))
                tensors[f"decoder.{stage}.{block}.conv{i}"] = flat(getattr(layers[at], f"conv{i}"))
        if stage + 1 < len(config.decoder):
            at += 1
            norm(f"decoder.{stage}.up.norm", layers[at].norm)
            tensors[f"decoder.{stage}.up.conv"] = flat(layers[at].conv)
    norm("decoder.norm", layers[at + 1])
    tensors["decoder.out"], tensors["decoder.out.bias"] = flat(decoder.out), decoder.out.bias
    return tensors


def tokenizer_tensors(model):
    quantizer = model.quantizer
    return {
        "codebook": quantizer.codebook,
        "phi.weight": torch.stack([phi.weight for phi in quantizer.phis]),
        "phi.bias": torch.stack([phi.bias for phi in quantizer.phis]),
        **decoder_tensors(model.decoder, model.config),
    }


def transformer_tensors(transformer):
    tensors = {
        "conditions": transformer.table(),
        "positions": transformer.positions,
        "embed": transformer.embed.weight.T if transformer.causal else transformer.embed.weight,
        "modulation": transformer.modulation.weight,
        "head.modulation": transformer.head_modulation.weight,
        "head.modulation.bias": transformer.head_modulation.bias,
        "head": transformer.head.weight,
    }
    for i, layer in enumerate(transformer.layers):
        tensors[f"layers.{i}.modulation"] = layer.modulation
        # In f32: what attention multiplies queries by.
        tensors[f"layers.{i}.multiplier"] = layer.multiplier.clamp(max=4.605170185988092).exp().float()
        for name in ("qkv", "out", "up", "down"):
            tensors[f"layers.{i}.{name}"] = getattr(layer, name).weight
    return tensors


def round_weights(model):
    """To what f16 holds, so that PyTorch and the engine have the same weights (but for classes, which are sums)."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("multiplier"):
                parameter.copy_(parameter.half().float())


def write(path, tensors, metadata):
    """safetensors, in f16 but for multipliers, goldens and integers, with a checksum of all after the header.

    By hand, since the library puts metadata in an order that changes from run to run."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            tensor = tensor.float() if name.endswith("multiplier") or name.startswith("golden.") else tensor.half()
        values = tensor.detach().cpu().contiguous().numpy()
        dtype = {"int32": "I32", "float32": "F32", "float16": "F16"}[str(values.dtype)]
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + values.nbytes],
        }
        data += values.tobytes()
    text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    header = {"__metadata__": {**text, "checksum": f"crc32={zlib.crc32(data):08x}"}, **header}
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path.stat().st_size


@torch.no_grad()
def goldens(model, image, label, rows):
    """What PyTorch makes of one image, in f32 on the CPU."""
    tokens = model.quantizer.encode(model.encoder(image[None]))[0]
    inputs, f_hat = model.quantizer.chain(tokens)
    said = torch.tensor([label])
    logits = {}
    for name in ("var", "ar", "draft"):
        transformer = getattr(model, name)
        # The engine's table of classes is rounded after the sum.
        condition = transformer.table()[transformer.classes_from + said].half().float()
        logits[f"golden.{name}.logits"] = transformer(condition, tokens[:, :-1] if transformer.causal else inputs)[
            0, rows
        ]
    return {
        "golden.tokens": tokens[0].int(),
        "golden.class": said.int(),
        "golden.rows": torch.tensor(rows).int(),
        "golden.inputs": inputs[0],
        "golden.f_hat": f_hat[0],
        "golden.image": model.decoder(f_hat)[0].permute(1, 2, 0).contiguous(),
        **logits,
    }
