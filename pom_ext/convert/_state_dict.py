"""Reading a state dict of other code, key by key, with all mismatches in one error message."""

import functools

import torch


class StateDictReader:
    """Returns the tensors of a state dict by key and shape, and records every mismatch."""

    def __init__(self, state_dict):
        self.tensors, self.unread, self.problems = state_dict, set(state_dict), []

    def __call__(self, key, *shape):
        """The tensor of this key and shape. Zeros if it is missing or of another shape; `fill` then raises."""
        self.unread.discard(key)
        if key not in self.tensors:
            self.problems.append(f"missing {key!r} {shape}")
        elif tuple(self.tensors[key].shape) != shape:
            self.problems.append(f"{key!r} has shape {tuple(self.tensors[key].shape)}, expected {shape}")
        else:
            return self.tensors[key].detach()
        return torch.zeros(shape)

    def linear(self, ours, theirs, out_features, in_features, bias=True):
        """{name: tensor} of a linear layer: read under the name `theirs`, returned under the name `ours`."""
        tensors = {f"{ours}.weight": self(f"{theirs}.weight", out_features, in_features)}
        return tensors | ({f"{ours}.bias": self(f"{theirs}.bias", out_features)} if bias else {})

    def fill(self, build, tensors):
        """The module that build() returns, with copies of the tensors as parameters.

        Raises:
            ValueError: keys were missing, were not read, or had another shape.
        """
        problems = self.problems + [f"unexpected {key!r}" for key in self.tensors if key in self.unread]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"state_dict: does not fit the arguments: {'; '.join(problems[:8])}{more}")
        with torch.device("meta"):  # skips the initialisation, which would be overwritten
            module = build()
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
        copies = {name: t.to(dtype).clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
        module.load_state_dict(copies, assign=True)
        return module


def layer_width(state_dict):
    """Width of a mixer layer, from the output projection, which every form of it has."""
    if "ag_proj.weight" not in state_dict:
        keys = ", ".join(map(repr, list(state_dict)[:8])) or "no key"
        raise ValueError(f"state_dict: missing 'ag_proj.weight', so this is no layer of the authors'; got {keys}")
    return state_dict["ag_proj.weight"].shape[0]
