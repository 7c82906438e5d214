"""`pom-ext doctor --explain`: which implementation the call of a layer takes, and why not the others."""

from collections.abc import Iterator

MODES = ("none", "causal", "frames", "weight")
SETTINGS = {  # by name: the default, and what a value must be
    "form": ("power", "product or power"),
    "dim": ("384", "a positive integer"),
    "degree": ("3", "1 to 16"),
    "heads": ("6", "a positive integer; 1 is a gate per channel"),
    "batch": ("1", "a positive integer"),
    "tokens": ("256", "a positive integer"),
    "device": ("cpu", "cpu or cuda"),
    "dtype": ("float32", "float32, float64, bfloat16 or float16"),
    "memory": ("store", "store or recompute"),
    "mode": ("none", ", ".join(MODES)),
    "train": ("no", "yes or no"),
}


def parse(words: list[str]) -> dict[str, str]:
    """The settings of the call: the defaults, and NAME=VALUE words in their place.

    Raises:
        ValueError: a word is no NAME=VALUE, or the name is unknown.
    """
    settings = {name: default for name, (default, _) in SETTINGS.items()}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in SETTINGS:
            raise ValueError(f"{word}: expected NAME=VALUE with one of the names {', '.join(SETTINGS)}")
        settings[name] = value
    return settings


def _number(settings: dict[str, str], name: str) -> int:
    if not settings[name].isdecimal() or int(settings[name]) < 1:
        raise ValueError(f"{name}: expected {SETTINGS[name][1]}, got {settings[name]}")
    return int(settings[name])


def _one_of(settings: dict[str, str], name: str, values: tuple[str, ...]) -> str:
    if settings[name] not in values:
        raise ValueError(f"{name}: expected {SETTINGS[name][1]}, got {settings[name]}")
    return settings[name]


def explain(words: list[str]) -> Iterator[str]:
    """Make the call that NAME=VALUE words describe, and yield a line for each decision and each reason.

    Raises:
        ValueError: a setting that makes no layer or no call; the message names it.
    """
    import torch

    from ..layers import PoM
    from ..ops import dispatch

    settings = parse(words)
    dim, degree, heads, batch, tokens = (_number(settings, n) for n in ("dim", "degree", "heads", "batch", "tokens"))
    dtype = getattr(torch, _one_of(settings, "dtype", ("float32", "float64", "bfloat16", "float16")))
    device = _one_of(settings, "device", ("cpu", "cuda"))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: torch sees no GPU here; expected cpu")
    mode = _one_of(settings, "mode", MODES)
    train = _one_of(settings, "train", ("yes", "no")) == "yes"
    layer = PoM(dim, degree, form=settings["form"], n_sel_heads=heads, memory=settings["memory"]).to(device, dtype)
    x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=train)
    contexts = {
        "causal": True,
        "frames": [tokens * i // 4 for i in range(5)],
        "weight": torch.ones(batch, tokens, device=device),
    }
    context = {} if mode == "none" else {mode: contexts[mode]}
    with dispatch.explained() as decisions, torch.set_grad_enabled(train):
        y = layer(x, **context)
        if train:
            y.sum().backward()
    yield "call       " + " ".join(f"{name}={value}" for name, value in settings.items())
    for decision in decisions:
        yield f"{decision.operation}: {decision.taken}"
        for name, reasons in decision.refused:
            yield f"    not {name}: {'; '.join(reasons)}"
