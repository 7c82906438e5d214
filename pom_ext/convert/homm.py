"""Weights of davidpicard/HoMM as layers and models of this package.

Every function takes a state dict of the authors' code, checks that its keys and shapes are exactly those that the other
arguments imply, and returns a module in the dtype and on the device of the tensors.
"""

import math

import torch

from ..layers import PoM
from ..layers.embeddings import time_frequencies
from ..models.image import ImageDiT
from ..models.video import VideoDiT
from ._state_dict import StateDictReader, layer_width


def pom_from_homm(state_dict, degree, expand):
    """`PoM(form="product")` from a state dict of davidpicard/HoMM:src/model/network/layers.py `HoM`.

    Raises:
        ValueError: keys or shapes do not fit degree and expand; the message names them.
    """
    dim, bias, read = layer_width(state_dict), "ag_proj.bias" in state_dict, StateDictReader(state_dict)
    tensors = _layer(read, "", "", (dim, degree, expand), bias)
    return read.fill(lambda: PoM(dim, degree, expand, form="product", bias=bias), tensors)


def image_dit_from_homm(
    state_dict, *, input_dim, n_classes, im_size, patch, dim, n_layers, order, order_expand, ffw_expand, n_registers=0
):
    """`ImageDiT` from a state dict of davidpicard/HoMM:src/model/network/imagediffusion.py.

    ClassConditionalDiH, or with n_registers ClassConditionalDiHpp. The arguments are those of the authors' model;
    `patch` is their kernel_size.

    Raises:
        ValueError: keys or shapes do not fit the arguments, or the time frequencies have a range other than [0, 1000);
            the message names them.
    """
    if n_registers == 0 and "registers" in state_dict:
        stored = state_dict["registers"].shape[1]
        raise ValueError(f"n_registers: the state dict is of a model with {stored} registers, got n_registers=0")
    read, side = StateDictReader(state_dict), im_size // patch
    kernel = read("in_conv.weight", dim, input_dim, patch, patch)
    tensors = {
        "patch_in.weight": kernel.permute(0, 2, 3, 1).flatten(1),
        "patch_in.bias": read("in_conv.bias", dim),
        "label_embed.weight": read("classes_emb.weight", n_classes + 1, dim),
        **_time_and_output(read, dim, patch * patch * input_dim),
    }
    for layer in range(n_layers):
        tensors |= _block(read, layer, (dim, order, order_expand), ffw_expand)
    if n_registers:
        condition = read("cond_pos_emb", 1, n_registers + side**2, dim)[0]
        tensors |= {
            "registers": read("registers", 1, n_registers, dim)[0],
            "register_cond": condition[:n_registers],
            "positions.table": read("pos_emb", 1, side**2, dim).reshape(side, side, dim),
            "position_cond.table": condition[n_registers:].reshape(side, side, dim),
        }
    _check_time(read, dim)
    options = {"patch": patch, "dim": dim, "n_layers": n_layers, "n_heads": 1, "mixer": "product", "degree": order}
    options |= {"expand": order_expand, "ffw_expand": ffw_expand, "local_conv": False, "n_registers": n_registers}
    return read.fill(lambda: ImageDiT(input_dim, n_classes, im_size, **options), tensors)


def video_dit_from_homm(
    state_dict, *, input_dim, text_dim, vid_size, vid_length, patch, dim, n_layers, order, order_expand, ffw_expand
):
    """`VideoDiT` from a state dict of davidpicard/HoMM, branch text2video: src/model/network/videodiffusion.py.

    The arguments are those of the authors' TextVideoDiH; vid_size is (height, width), and `patch` is their
    (kernel_t, kernel_s, kernel_s).

    Raises:
        ValueError: keys or shapes do not fit the arguments, or the time frequencies have a range other than [0, 1000);
            the message names them.
    """
    read, width = StateDictReader(state_dict), math.prod(patch) * input_dim
    tensors = {
        **read.linear("patch_in", "in_proj", dim, width),
        **read.linear("text_embed", "text_emb", dim, text_dim),
        **_time_and_output(read, dim, width),
    }
    for layer in range(n_layers):
        tensors |= _block(read, layer, (dim, order, order_expand), ffw_expand, text=True)
    _check_time(read, dim)
    options = {"text_dim": text_dim, "patch": patch, "dim": dim, "n_layers": n_layers, "n_heads": 1, "degree": order}
    options |= {"mixer": "product", "expand": order_expand, "ffw_expand": ffw_expand, "local_conv": False}
    return read.fill(lambda: VideoDiT(input_dim, vid_size, vid_length, **options), tensors)


def _layer(read, ours, theirs, sizes, bias=True):
    """Parameters of one HoM layer under our names. sizes: dim, degree, expand."""
    dim, width = sizes[0], math.prod(sizes)
    return (
        read.linear(f"{ours}context_proj", f"{theirs}ho_proj", width, dim, bias)
        | read.linear(f"{ours}gate_proj", f"{theirs}se_proj", width, dim, bias)
        | read.linear(f"{ours}out_proj", f"{theirs}ag_proj", dim, width, bias)
    )


def _block(read, layer, sizes, ffw_expand, text=False):
    """Parameters of a block. The authors store its modulations in one linear layer, its gates in another.

    sizes: dim, degree, expand. text: whether the block reads text before it mixes.
    """
    ours, theirs, dim = f"blocks.{layer}", f"layers.{layer}", sizes[0]
    tensors = _layer(read, f"{ours}.cross_mixer.", f"{theirs}.c_hom.", sizes) if text else {}
    tensors |= _layer(read, f"{ours}.mixer.", f"{theirs}.hom.", sizes)
    tensors |= read.linear(f"{ours}.ffw.0", f"{theirs}.ffw.0", ffw_expand * dim, dim)
    tensors |= read.linear(f"{ours}.ffw.2", f"{theirs}.ffw.2", dim, ffw_expand * dim)
    norms = ("cross", "text", "mixer", "ffw") if text else ("mixer", "ffw")
    gates = [name for name in norms if name != "text"]
    for kind, columns in (("weight", (dim,)), ("bias", ())):
        parts = read(f"{theirs}.cond_mlp.1.{kind}", 2 * dim * len(norms), *columns).split(2 * dim)
        tensors |= {f"{ours}.{name}_norm.modulation.{kind}": part for name, part in zip(norms, parts, strict=True)}
        parts = read(f"{theirs}.gate_mlp.1.{kind}", dim * len(gates), *columns).split(dim)
        tensors |= {f"{ours}.{name}_gate.{kind}": part for name, part in zip(gates, parts, strict=True)}
    return tensors


def _time_and_output(read, dim, width):
    """Parameters of the time embedding and of the output layers, which return patches of `width` numbers."""
    return {
        **read.linear("time_embed.mlp.0", "time_emb.0", 4 * dim, dim),
        **read.linear("time_embed.mlp.2", "time_emb.2", dim, 4 * dim),
        **read.linear("norm_out.modulation", "out_mod.1", 2 * dim, dim),
        **read.linear("patch_out", "out_proj", width, dim),
    }


def _check_time(read, dim):
    """Compare the stored frequencies of the time embedding with ours."""
    frequencies = read("freqs", dim // 2)
    ours = time_frequencies(dim, like=frequencies).to(frequencies)
    if "freqs" in read.tensors and not torch.allclose(frequencies, ours, rtol=1e-2):
        read.problems.append("'freqs' holds the frequencies of another range of time than [0, 1000)")
