"""Tensors of every memory layout."""

from dataclasses import replace


def inside_nan(tensor, step=1, before=3, after=1):
    """The same values in the middle of a larger buffer of NaN, `step` apart: whoever reads beside them shows it."""
    buffer = tensor.new_full([before + step * size + after for size in tensor.shape], float("nan"))
    view = buffer[tuple(slice(before, before + step * size, step) for size in tensor.shape)]
    return view.copy_(tensor)


def elements_off(tensor, count):
    """Contiguous, at an address that is aligned to so many elements alone."""
    return tensor.new_empty(tensor.numel() + count)[count:].view(tensor.shape).copy_(tensor)


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": inside_nan,
    "every other": lambda t: inside_nan(t, step=2),
    "sliced by four": lambda t: inside_nan(t, before=4, after=4),
    "unaligned": lambda t: elements_off(t, 1),
    "aligned to four": lambda t: elements_off(t, 4),
    "one sample": lambda t: t[:1].expand_as(t),
    "one row": lambda t: t[..., :1, :].expand_as(t),
    "one channel": lambda t: t[..., :1].expand_as(t),
    "one value": lambda t: t.flatten()[3].expand_as(t),
}


def with_layout(inputs, argument, layout):
    """The same call with one of its tensors laid out differently."""
    if argument.startswith("grad of "):
        name = argument.removeprefix("grad of ")
        return replace(inputs, output_grads=inputs.output_grads | {name: layout(inputs.output_grads[name])})
    if argument in inputs.context:
        return replace(inputs, context=inputs.context | {argument: layout(inputs.context[argument])})
    return replace(inputs, leaves=inputs.leaves | {argument: layout(inputs.leaves[argument])})
