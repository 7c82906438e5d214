"""Weights of davidpicard/pom as layers of this package."""

import torch

from ..layers import PoM
from ..ops import rotary_table
from ._state_dict import StateDictReader, layer_width

ROPE_TABLES = {None: (), "1d": ("freqs_cos", "freqs_sin"), "2d": ("row_cos", "row_sin", "col_cos", "col_sin")}


def pom_from_pom(state_dict, degree, expand, n_groups, n_sel_heads, rope=None):
    """`PoM(form="power")` from a state dict of davidpicard/pom:pom/pom.py `PoM` or pom/pom_rope.py `PoMRoPE`.

    With one group the authors' context projection has no bias even if the output projection has one; ours is then zero.
    The frequency tables that PoMRoPE stores are compared with ours and dropped.

    Args:
        state_dict: {name: tensor} of the authors' layer.
        degree, expand, n_groups, n_sel_heads: as the authors' layer was built.
        rope: None for PoM, "1d" or "2d" for PoMRoPE.

    Returns:
        PoM in the dtype and on the device of the tensors.

    Raises:
        ValueError: keys or shapes do not fit the arguments, or the rotary angles have a base other than 10000; the
            message names them.
    """
    if rope not in ROPE_TABLES:
        raise ValueError(f"rope: expected None, '1d' or '2d', got {rope!r}")
    dim, bias, read = layer_width(state_dict), "ag_proj.bias" in state_dict, StateDictReader(state_dict)
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
    _check_rope(read, width, rope)
    options = {"form": "power", "n_groups": n_groups, "n_sel_heads": max(n_sel_heads, 1), "bias": bias, "rope": rope}
    return read.fill(lambda: PoM(dim, degree, expand, **options), tensors)


def _check_rope(read, width, rope):
    """Compare the stored tables, (positions, frequencies) each, with ours. A state dict may lack them."""
    axes = len(ROPE_TABLES[rope]) // 2
    for key in ROPE_TABLES[rope]:
        if key in read.tensors:
            table = read(key, len(read.tensors[key]), width // (2 * axes))
            ours = rotary_table(torch.arange(min(2, len(table))), width // axes, axes=1)
            ours = ours.cos if key.endswith("cos") else ours.sin
            if not torch.allclose(table[: len(ours)].to(ours), ours, atol=1e-2):
                read.problems.append(f"{key!r} holds rotary angles of another base than 10000")
