"""The authors' weights as layers and models of this package.

Every function takes a state dict of the authors' code, checks that it holds exactly the keys and shapes that the other
arguments ask for, and returns a module in the dtype and on the device of the tensors.
"""

import functools
import math

import torch

from ..layers import PoM
from ..models.blocks import time_frequencies
from ..models.image import ImageDiT
from ..models.video import VideoDiT
from ..ops import rotary_table

ROPE_TABLES = {None: (), "1d": ("freqs_cos", "freqs_sin"), "2d": ("row_cos", "row_sin", "col_cos", "col_sin")}


class _Reader:
    """Hands out the tensors of a state dict by key and shape, and keeps account of all that does not fit."""

    def __init__(self, state_dict):
        self.tensors, self.unread, self.problems = state_dict, set(state_dict), []

    def __call__(self, key, *shape):
        self.unread.discard(key)
        if key not in self.tensors:
            self.problems.append(f"missing {key!r} {shape}")
        elif tuple(self.tensors[key].shape) != shape:
            self.problems.append(f"{key!r} has shape {tuple(self.tensors[key].shape)}, expected {shape}")
        else:
            return self.tensors[key].detach()
        return torch.zeros(shape)  # stands in until `fill` raises

    def linear(self, ours, theirs, out_features, in_features, bias=True):
        """One linear map, under our name."""
        tensors = {f"{ours}.weight": self(f"{theirs}.weight", out_features, in_features)}
        return tensors | ({f"{ours}.bias": self(f"{theirs}.bias", out_features)} if bias else {})

    def fill(self, build, tensors):
        """build() with these parameters; raises ValueError if anything was missing, left over or of another shape."""
        problems = self.problems + [f"unexpected {key!r}" for key in self.tensors if key in self.unread]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"state_dict: does not fit the arguments: {'; '.join(problems[:8])}{more}")
        with torch.device("meta"):  # nothing is initialised that is overwritten at once
            module = build()
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        copies = {name: t.to(dtype).clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        module.load_state_dict(copies, assign=True)
        return module


def _homm_layer(read, ours, theirs, dim, degree, expand, bias=True):
    """The parameters of one HoM, under our names."""
    width = degree * expand * dim
    return (
        read.linear(f"{ours}context_proj", f"{theirs}ho_proj", width, dim, bias)
        | read.linear(f"{ours}gate_proj", f"{theirs}se_proj", width, dim, bias)
        | read.linear(f"{ours}out_proj", f"{theirs}ag_proj", dim, width, bias)
    )


def _layer_dim(state_dict):
    """Width of a layer, from the projection that every form of it has."""
    if "ag_proj.weight" not in state_dict:
        keys = ", ".join(map(repr, list(state_dict)[:8])) or "no key"
        raise ValueError(f"state_dict: missing 'ag_proj.weight', so this is no layer of the authors'; got {keys}")
    return state_dict["ag_proj.weight"].shape[0]


def pom_from_homm(state_dict, degree, expand):
    """`PoM(form="product")` from a state dict of davidpicard/HoMM:src/model/network/layers.py `HoM`.

    Raises:
        ValueError: keys or shapes other than degree and expand ask for; the message names them.
    """
    dim, bias, read = _layer_dim(state_dict), "ag_proj.bias" in state_dict, _Reader(state_dict)
    tensors = _homm_layer(read, "", "", dim, degree, expand, bias)
    return read.fill(lambda: PoM(dim, degree, expand, form="product", bias=bias), tensors)


def pom_from_pom(state_dict, degree, expand, n_groups, n_sel_heads, rope=None):
    """`PoM(form="power")` from a state dict of davidpicard/pom:pom/pom.py `PoM` or pom/pom_rope.py `PoMRoPE`.

    With one group the authors' context projection has no bias even where the output projection has one; ours is then
    zero. The frequency tables that PoMRoPE stores are compared with ours and dropped.

    Args:
        rope: None for PoM, "1d" or "2d" for PoMRoPE.

    Raises:
        ValueError: keys or shapes other than the arguments ask for, or rotary angles of another base than 10000; the
            message names them.
    """
    if rope not in ROPE_TABLES:
        raise ValueError(f"rope: expected None, '1d' or '2d', got {rope!r}")
    dim, bias, read = _layer_dim(state_dict), "ag_proj.bias" in state_dict, _Reader(state_dict)
    if n_groups < 1 or dim % n_groups:
        raise ValueError(f"n_groups: expected a divisor of the layer's width {dim}, got {n_groups}")
    width = dim * expand
    gates = n_sel_heads if n_sel_heads > 1 else width
    tensors = {"coeff": read("po_coeff", width, degree)} | read.linear("out_proj", "ag_proj", dim, width, bias)
    if n_groups == 1:
        context, gate = read("qc_proj.weight", width + gates, dim).split([width, gates])
        tensors |= {"context_proj.weight": context, "gate_proj.weight": gate, "gate_proj.bias": read("se_bias", gates)}
        if bias:
            tensors["context_proj.bias"] = torch.zeros_like(tensors["coeff"][:, 0])
    else:
        context = read("po_proj.weight", width, dim // n_groups, 1)
        tensors["context_proj.weight"] = context.reshape(n_groups, width // n_groups, dim // n_groups)
        tensors |= read.linear("gate_proj", "se_proj", gates, dim)
        if bias:
            tensors["context_proj.bias"] = read("po_proj.bias", width)
    _check_rope(read, state_dict, width, rope)
    options = {"form": "power", "n_groups": n_groups, "n_sel_heads": max(n_sel_heads, 1), "bias": bias, "rope": rope}
    return read.fill(lambda: PoM(dim, degree, expand, **options), tensors)


def _check_rope(read, state_dict, width, rope):
    """Compare the stored tables, (positions, frequencies) each, with ours. A state dict may lack them."""
    axes = len(ROPE_TABLES[rope]) // 2
    for key in ROPE_TABLES[rope]:
        if key in state_dict:
            table = read(key, len(state_dict[key]), width // (2 * axes))
            ours = rotary_table(torch.arange(min(2, len(table))), width // axes, axes=1)
            ours = ours.cos if key.endswith("cos") else ours.sin
            if not torch.allclose(table[: len(ours)].to(ours), ours, atol=1e-2):
                read.problems.append(f"{key!r} holds rotary angles of another base than 10000")


def image_dit_from_homm(state_dict, *, input_dim, n_classes, im_size, patch, dim, n_layers, order, order_expand,
                        ffw_expand, n_registers=0):  # fmt: skip
    """`ImageDiT` from a state dict of davidpicard/HoMM:src/model/network/imagediffusion.py.

    ClassConditionalDiH, or ClassConditionalDiHpp where n_registers is given. The arguments are those that the authors'
    model was built with; `patch` is their kernel_size.

    Raises:
        ValueError: keys or shapes other than the arguments ask for, or time frequencies of another range than
            [0, 1000); the message names them.
    """
    if n_registers == 0 and "registers" in state_dict:
        given = state_dict["registers"].shape[1]
        raise ValueError(f"n_registers: the state dict is of a model with {given} registers, got n_registers=0")
    read, side = _Reader(state_dict), im_size // patch
    kernel = read("in_conv.weight", dim, input_dim, patch, patch)
    tensors = {
        "patch_in.weight": kernel.permute(0, 2, 3, 1).flatten(1),
        "patch_in.bias": read("in_conv.bias", dim),
        "label_embed.weight": read("classes_emb.weight", n_classes + 1, dim),
        **_frame(read, dim, patch * patch * input_dim),
    }
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        tensors |= _block(read, ours, theirs, dim, order, order_expand, ffw_expand)
        tensors |= _modulation(read, ours, theirs, dim, norms=("mixer", "ffw"), gates=("mixer", "ffw"))
    if n_registers:
        condition = read("cond_pos_emb", 1, n_registers + side**2, dim)[0]
        tensors |= {
            "registers": read("registers", 1, n_registers, dim)[0],
            "register_cond": condition[:n_registers],
            "positions.table": read("pos_emb", 1, side**2, dim).reshape(side, side, dim),
            "position_cond.table": condition[n_registers:].reshape(side, side, dim),
        }
    _check_time(read, state_dict, dim)
    options = {"patch": patch, "dim": dim, "n_layers": n_layers, "n_heads": 1, "mixer": "product", "degree": order}
    options |= {"expand": order_expand, "ffw_expand": ffw_expand, "local_conv": False, "n_registers": n_registers}
    return read.fill(lambda: ImageDiT(input_dim, n_classes, im_size, **options), tensors)


def video_dit_from_homm(state_dict, *, input_dim, text_dim, vid_size, vid_length, patch, dim, n_layers, order,
                        order_expand, ffw_expand):  # fmt: skip
    """`VideoDiT` from a state dict of davidpicard/HoMM, branch text2video: src/model/network/videodiffusion.py.

    The arguments are those that the authors' TextVideoDiH was built with; vid_size is (height, width), and `patch` is
    their (kernel_t, kernel_s, kernel_s).

    Raises:
        ValueError: keys or shapes other than the arguments ask for, or time frequencies of another range than
            [0, 1000); the message names them.
    """
    read, width = _Reader(state_dict), math.prod(patch) * input_dim
    tensors = {
        **read.linear("patch_in", "in_proj", dim, width),
        **read.linear("text_embed", "text_emb", dim, text_dim),
        **_frame(read, dim, width),
    }
    for layer in range(n_layers):
        ours, theirs = f"blocks.{layer}", f"layers.{layer}"
        tensors |= _homm_layer(read, f"{ours}.cross_mixer.", f"{theirs}.c_hom.", dim, order, order_expand)
        tensors |= _block(read, ours, theirs, dim, order, order_expand, ffw_expand)
        norms, gates = ("cross", "text", "mixer", "ffw"), ("cross", "mixer", "ffw")
        tensors |= _modulation(read, ours, theirs, dim, norms, gates)
    _check_time(read, state_dict, dim)
    options = {"text_dim": text_dim, "patch": patch, "dim": dim, "n_layers": n_layers, "n_heads": 1, "degree": order}
    options |= {"mixer": "product", "expand": order_expand, "ffw_expand": ffw_expand, "local_conv": False}
    return read.fill(lambda: VideoDiT(input_dim, vid_size, vid_length, **options), tensors)


def _frame(read, dim, width):
    """What stands around the blocks: the embedding of time, and the way out to patches of `width` numbers."""
    return {
        **read.linear("time_embed.mlp.0", "time_emb.0", 4 * dim, dim),
        **read.linear("time_embed.mlp.2", "time_emb.2", dim, 4 * dim),
        **read.linear("norm_out.modulation", "out_mod.1", 2 * dim, dim),
        **read.linear("patch_out", "out_proj", width, dim),
    }


def _block(read, ours, theirs, dim, order, order_expand, ffw_expand):
    """The mixer and the feed-forward layers of a block."""
    return (
        _homm_layer(read, f"{ours}.mixer.", f"{theirs}.hom.", dim, order, order_expand)
        | read.linear(f"{ours}.ffw.0", f"{theirs}.ffw.0", ffw_expand * dim, dim)
        | read.linear(f"{ours}.ffw.2", f"{theirs}.ffw.2", dim, ffw_expand * dim)
    )


def _modulation(read, ours, theirs, dim, norms, gates):
    """The authors keep scale, shift of all norms of a block in one linear map, and its gates in another."""
    tensors = {}
    for kind, columns in (("weight", (dim,)), ("bias", ())):
        parts = read(f"{theirs}.cond_mlp.1.{kind}", 2 * dim * len(norms), *columns).split(2 * dim)
        tensors |= {f"{ours}.{name}_norm.modulation.{kind}": part for name, part in zip(norms, parts, strict=True)}
        parts = read(f"{theirs}.gate_mlp.1.{kind}", dim * len(gates), *columns).split(dim)
        tensors |= {f"{ours}.{name}_gate.{kind}": part for name, part in zip(gates, parts, strict=True)}
    return tensors


def _check_time(read, state_dict, dim):
    """Compare the stored frequencies of the time embedding with ours."""
    frequencies = read("freqs", dim // 2)
    ours = time_frequencies(dim, like=frequencies).to(frequencies)
    if "freqs" in state_dict and not torch.allclose(frequencies, ours, rtol=1e-2):
        read.problems.append("'freqs' holds the frequencies of another range of time than [0, 1000)")
