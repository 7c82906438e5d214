"""Export of a VideoDiT checkpoint as a float32 safetensors file, for programs without torch (examples/stream.cpp)."""

import torch
from safetensors.torch import save_file

from .._io import atomic_write
from ..diffusion.context import stream_context
from ..layers.embeddings import sincos_positions, time_frequencies
from ..layers.layout import Grid
from ..models.checkpoint import load_model
from ..models.config import VideoDiTConfig

FORMAT = "pom_ext video 2"  # change it whenever programs for the last format would misread a file


def export_model(checkpoint, path):
    """Write the averaged weights of a video model in the layout of the engine (csrc/include/pom/engine.h).

    The tensors are float32. The context and gate projections of a layer are stacked; the modulations of all layers are
    stacked, with their "1 +" added to the bias. Missing biases are zeros. The metadata are numbers and words.

    Args:
        checkpoint: a file that training wrote.
        path: the file to write, completely or not at all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or its model has a feature that the engine lacks.
    """
    model, settings = load_model(checkpoint)
    _check_supported(checkpoint, model, settings)
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in _tensors(model).items()}
    with atomic_write(path) as aside:
        save_file(tensors, aside, metadata=_metadata(model, settings))


def _check_supported(checkpoint, model, settings):
    if settings.get("architecture") != "VideoDiT":
        raise ValueError(f"checkpoint: expected a video model, {checkpoint} is one of images")
    if any("attention" in kind for kind in VideoDiTConfig(**model.config).mixers):
        raise ValueError("mixer: expected product or power in every layer; the engine has no attention")
    if model.config["read"] != "shared":
        raise ValueError(f"read: expected 'shared', got {model.config['read']!r}, which the engine does not have yet")
    if model.text_dim:
        raise ValueError(f"text_dim: expected a model without text, got text_dim={model.text_dim}")
    if model.positions != "space":
        raise ValueError(f"positions: expected 'space', which has no end, got {model.positions!r}")
    if model.config["two_times"]:
        raise ValueError("two_times: expected False, got True; the engine has one time, and draws with flow matching")
    if settings["train"]["objective"] != "flow":
        raise ValueError(f"objective: expected flow matching, 'flow', got {settings['train']['objective']!r}")


def _metadata(model, settings):
    mixers = [block.mixer for block in model.blocks]
    values = {
        "format": FORMAT,
        "channels": model.in_channels,
        "patch": model.patch,
        "size": model.size,
        "dim": model.dim,
        "ffw": model.blocks[0].ffw[0].out_features,
        "classes": model.n_classes,
        "conv_frames": [0 if block.local_conv is None else 1 + block.local_conv.earlier for block in model.blocks],
        "forms": [mixer.form for mixer in mixers],
        "degrees": [mixer.degree for mixer in mixers],
        "heads": [mixer.n_sel_heads for mixer in mixers],
        "widths": [mixer.dim * mixer.expand for mixer in mixers],
        "context": stream_context(settings["train"]["context"]),
        "shift": settings["train"]["shift"],
        "fps": settings["data"].get("fps", 8.0),
    }
    return {name: " ".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for name, v in values.items()}


def _tensors(model):
    """{name: tensor}. D: width of a token, P: width of a patch, C: width of a state."""
    frequencies = model.time_embed.fastest * time_frequencies(model.dim, like=model.patch_in.weight)
    grid = Grid(*(length // unit for length, unit in zip(model.size, model.patch[1:], strict=True)))
    tensors = {
        "positions": sincos_positions(grid, model.dim, like=model.patch_in.weight)[0],  # (tokens, D)
        "time.frequencies": frequencies,  # (D / 2,)
        **_linear("patch_in", model.patch_in),  # (D, P)
        **_linear("time.in", model.time_embed.mlp[0]),  # (4 D, D)
        **_linear("time.out", model.time_embed.mlp[2]),  # (D, 4 D)
        **_linear("modulation", *_modulations(model)),  # (6 D for every layer, then 2 D; D)
        **_linear("patch_out", model.patch_out),  # (P, D)
    }
    if model.label_embed is not None:
        tensors["labels"] = model.label_embed.weight  # (classes + 1, D)
    for number, block in enumerate(model.blocks):
        name, mixer = f"layers.{number}", block.mixer
        tensors |= _linear(f"{name}.mixer_in", mixer.context_proj, mixer.gate_proj)  # (C + gates, D)
        tensors |= _linear(f"{name}.mixer_out", mixer.out_proj)  # (D, C)
        if mixer.coeff is not None:
            tensors[f"{name}.coeff"] = mixer.coeff  # (C, degree)
        tensors |= _linear(f"{name}.ffw_in", block.ffw[0]) | _linear(f"{name}.ffw_out", block.ffw[2])
        if block.local_conv is not None:
            conv = block.local_conv.conv
            weight = conv.weight.flatten(1).t()  # (conv_frames * 9, D): (frame, row, column), channels last
            tensors |= {f"{name}.conv.weight": weight, f"{name}.conv.bias": conv.bias}
    return tensors


def _modulations(model):
    """The linear layers that compute scales, shifts and gates of all blocks from the condition, in stacking order."""
    for block in model.blocks:
        for norm, gate in ((block.mixer_norm, block.mixer_gate), (block.ffw_norm, block.ffw_gate)):
            yield _plus_one(norm.modulation, model.dim)
            yield _plus_one(gate, model.dim)
    yield _plus_one(model.norm_out.modulation, model.dim)


def _plus_one(layer, rows):
    """The layer with 1 added to its first `rows` outputs: the model scales and gates by 1 + output."""
    one = (torch.arange(len(layer.bias)) < rows).to(layer.bias)
    shifted = torch.nn.Linear(layer.in_features, layer.out_features)
    shifted.weight, shifted.bias = layer.weight, torch.nn.Parameter(layer.bias.detach() + one)
    return shifted


def _linear(name, *layers):
    """{name: tensor} of linear layers stacked along their outputs."""
    bias = [layer.weight.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
    return {f"{name}.weight": torch.cat([layer.weight for layer in layers]), f"{name}.bias": torch.cat(bias)}
