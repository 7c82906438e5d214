"""Small video models and inputs for them, for the tests of the model, of its cache and of streams."""

import pytest
import torch

from pom_ext.models import VideoDiT

FRAMES, TEXT_DIM = 6, 5  # frames of tokens
SMALL = {"in_channels": 3, "size": (4, 6), "length": 2 * FRAMES, "patch": (2, 2, 2), "dim": 16, "n_layers": 2}
SMALL |= {"n_heads": 2, "ffw_expand": 2}
HYBRID = ["product", "attention", "power"]
CONDITIONS = {"text": {"text_dim": TEXT_DIM}, "class": {"n_classes": 4}, "none": {}}
CHUNKINGS = [(1,) * FRAMES, (FRAMES,), (2, 4), (3, 1, 2), (1, 5)]

MIXERS = {"product": "product", "power": "power", "attention": "attention", "hybrid": HYBRID}
MIXER = pytest.mark.parametrize("mixer", MIXERS.values(), ids=MIXERS)
CONV = pytest.mark.parametrize("local_conv", [True, False], ids=["conv", "plain"])
CONDITION = pytest.mark.parametrize("condition", CONDITIONS)


def small(seed=0, **changes):
    """A small model that has left its initialisation, where every gate is closed and the output 0."""
    torch.manual_seed(seed)
    if not isinstance(changes.get("mixer", ""), str):
        changes["n_layers"] = len(changes["mixer"])
    model = VideoDiT(**(SMALL | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, frames=FRAMES, batch=3, size=None, per_frame=False):
    """Arguments of a forward pass; the last sample's text is empty."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, model.in_channels, frames * model.patch[0], *(size or model.size))
    given = {"video": torch.randn(shape, generator=generator, dtype=torch.float64)}
    marks = (batch, frames) if per_frame else (batch,)
    given["time"] = 990 * torch.rand(marks, generator=generator, dtype=torch.float64)
    if model.text_dim:
        given["text"] = torch.randn(batch, 7, model.text_dim, generator=generator, dtype=torch.float64)
        given["text_weight"] = torch.rand(batch, 7, generator=generator, dtype=torch.float64)
        given["text_weight"][-1] = 0
    if model.n_classes:
        given["labels"] = torch.randint(0, model.n_classes + 1, marks, generator=generator)
    return given


def cut(model, given, first, last):
    """The arguments of the frames first to last."""
    t = model.patch[0]
    part = dict(given, video=given["video"][:, :, first * t : last * t])
    return part | {k: given[k][:, first:last] for k in ("time", "labels") if k in given and given[k].dim() == 2}


def stream(model, given, chunks, past=None, first=0):
    outs = []
    for chunk in chunks:
        out, past = model(**cut(model, given, first, first + chunk), frame_causal=True, past=past, return_past=True)
        first += chunk
        outs.append(out)
    return torch.cat(outs, dim=2), past


def tensors(past):
    return past.state_dict().values()


ZEROS = {"video": torch.zeros(2, 3, 4, 4, 6), "time": torch.zeros(2)}  # for VideoDiT(**SMALL)
