"""The split read in plain torch, by the formulas of docs/design.md: of a layer, and of a layer across video frames."""

import torch
import torch.nn.functional as F
from cases import twice_differentiable_gate

from pom_ext.ops.reference import rotate


def divide(total, count):
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0)


def features(layer, context):
    """φ(W_c c) of the layer's form, written out."""
    weight = layer.context_proj.weight
    u = F.linear(context, torch.block_diag(*weight) if weight.dim() == 3 else weight, layer.context_proj.bias)
    if layer.form == "power":
        a = F.leaky_relu(u, 0.01).clamp(-0.1, 6)
        return sum(layer.coeff[:, i] * a ** (i + 1) for i in range(layer.degree))
    products = list(F.gelu(u).chunk(layer.degree, dim=-1))
    for i in range(1, layer.degree):
        products[i] = products[i - 1] * products[i]
    return torch.cat(products, dim=-1)


def definition(layer, x, sizes, weight=None, positions=None, total=None, count=None):
    """Frame after frame, by the formulas of docs/design.md: y, and the sum and counts of the past after the last."""
    repeats = layer.state_width // layer.gate_proj.out_features  # channels that share a gate and a fade
    rotary, gate_rotary = layer._rotaries(x, x, positions, None)
    rotary, gate_rotary = (r and type(r)(r.cos.to(x.dtype), r.sin.to(x.dtype), r.axes) for r in (rotary, gate_rotary))
    phi = features(layer, x)
    gates = [twice_differentiable_gate(p(x), form=layer.form) for p in (layer.gate_proj, layer.past_gate_proj)]
    if rotary is not None:
        phi, gates = rotate(phi, *rotary), [rotate(gate, *gate_rotary) for gate in gates]
    own_gate, past_gate = (gate.repeat_interleave(repeats, dim=-1) for gate in gates)
    weight = x.new_ones(x.shape[:2]) if weight is None else weight.to(x.dtype)
    if total is None:
        total, count = x.new_zeros(len(x), layer.state_width), x.new_zeros(len(x), layer.gate_proj.out_features)
    ends, mixed = torch.tensor([0, *sizes]).cumsum(0).tolist(), []
    for start, end in zip(ends, ends[1:], strict=False):
        now = slice(start, end)
        w = weight[:, now, None]
        own, own_count = (w * phi[:, now]).sum(1), w.sum(1)  # (B, C), (B, 1)
        past = divide(total, count.repeat_interleave(repeats, dim=-1))
        mixed.append(own_gate[:, now] * divide(own, own_count)[:, None] + past_gate[:, now] * past[:, None])
        left = torch.ones_like(count)
        if layer.fade == "head":
            left = layer.fade_logit.sigmoid().expand_as(count)
        elif layer.fade == "gated":
            left = layer.fade_proj(divide((w * x[:, now]).sum(1), own_count)).sigmoid()
        total = left.repeat_interleave(repeats, dim=-1) * total + own
        count = left * count + own_count
    return layer.out_proj(torch.cat(mixed, dim=1)), total, count


def frame_definition(mixer, x, height, width, window=0, decay=1.0, coordinates=None):
    """`FrameMixer` with read="split" on tokens (B, T, S, D), frame-causal: every earlier frame with its weight.

    Frame j counts in the past of frame f as much as all frames between them have left of it.
    """
    batch, frames, size, dim = x.shape
    repeats = mixer.state_width // mixer.gate_proj.out_features
    tokens = x.flatten(1, 2)
    rotary, gate_rotary = mixer._rotaries(tokens, tokens, coordinates, None)
    phi = features(mixer, tokens)
    phi = (phi if rotary is None else rotate(phi, *rotary)).unflatten(1, (frames, size))

    def gate(projection):
        value = twice_differentiable_gate(projection(tokens), form=mixer.form)
        value = value if gate_rotary is None else rotate(value, *gate_rotary)
        return value.repeat_interleave(repeats, dim=-1).unflatten(1, (frames, size))

    fade = torch.ones(batch, frames, mixer.gate_proj.out_features, dtype=x.dtype)
    if mixer.fade == "head":
        fade = mixer.fade_logit.sigmoid().expand_as(fade)
    elif mixer.fade == "gated":
        fade = mixer.fade_proj(x.mean(2)).sigmoid()
    fade = decay * fade.repeat_interleave(repeats, dim=-1)  # (B, T, C)
    side = mixer.space_groups
    place = torch.arange(size).view(height, width)
    block = (place // width // side * (width // side) + place % width // side).flatten() if side > 1 else None

    def mean(tokens_of, weights):  # Σ_j weights_j Σ_n φ_jn / Σ_j weights_j N over the tokens (T, S) that are True
        w = weights[:, :, None] * tokens_of[None, :, :, None]  # (B, T, S, C)
        return divide((w * phi).sum((1, 2)), w.sum((1, 2)))[:, None]  # (B, 1, C)

    everywhere, mixed = torch.ones(frames, size, dtype=x.dtype), []
    for f in range(frames):
        weights = torch.zeros_like(fade)
        for j in range(f):
            if not window or f - j < window:
                weights[:, j] = fade[:, j + 1 : f].prod(1)
        own, first = torch.zeros_like(fade), torch.zeros_like(fade)
        own[:, f], first[:, : min(f, mixer.sink)] = 1, 1
        y = gate(mixer.gate_proj)[:, f] * mean(everywhere, own)
        y = y + gate(mixer.past_gate_proj)[:, f] * mean(everywhere, weights)
        if mixer.sink:
            y = y + gate(mixer.sink_gate_proj)[:, f] * mean(everywhere, first)
        if block is not None:
            reads = [mean((block == number).to(x.dtype).expand(frames, -1), weights) for number in block]
            y = y + gate(mixer.block_gate_proj)[:, f] * torch.cat(reads, dim=1)
        mixed.append(mixer.out_proj(y))
    return torch.stack(mixed, dim=1)
