"""Configurations of the models: their arguments with defaults, checks, and the JSON form that checkpoints hold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..layers.blocks import FRAME_MIXERS, MIXERS
from ..layers.embeddings import SMOOTH
from ..layers.local_conv import MOST_EARLIER
from ..layers.pom import FADES, READS
from ..ops.checks import is_integer
from .checks import check_at_least, check_blocks, check_integers

NAMED_FRAMES = {"frame": 0, "clip": MOST_EARLIER}  # `local_conv` by name
POSITIONS = ("sincos", "space", "rotary")
SIZES = {
    "S": {"dim": 384, "n_layers": 12, "n_heads": 6},
    "B": {"dim": 768, "n_layers": 12, "n_heads": 12},
    "L": {"dim": 1024, "n_layers": 24, "n_heads": 16},
    "XL": {"dim": 1152, "n_layers": 28, "n_heads": 16},
}


class ModelConfig:
    """What the configurations of both models share."""

    dim: int
    n_layers: int
    n_heads: int
    mixer: str | Sequence[str]

    @property
    def mixers(self) -> list[str]:
        """The mixer of every layer."""
        return [self.mixer] * self.n_layers if isinstance(self.mixer, str) else list(self.mixer)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain JSON values: sequences as lists."""
        values = vars(self)
        return values | {k: list(v) for k, v in values.items() if isinstance(v, Iterable) and not isinstance(v, str)}

    def check_mixers(self, allowed: Sequence[str]) -> None:
        """ValueError unless there is an allowed mixer for every layer, and the heads divide the width."""
        if self.dim % self.n_heads:
            raise ValueError(f"n_heads: expected a divisor of dim={self.dim}, got {self.n_heads}")
        for kind in self.mixers:
            if kind not in allowed:
                raise ValueError(f"mixer: expected one of {', '.join(allowed)}, got {kind!r}")
        if len(self.mixers) != self.n_layers:
            raise ValueError(f"mixer: expected one for each of n_layers={self.n_layers} layers, got {len(self.mixers)}")


@dataclass(frozen=True)
class ImageDiTConfig(ModelConfig):
    """The arguments of `ImageDiT`, which says what they mean. Raises ValueError if they do not make a model."""

    in_channels: int = 4
    n_classes: int = 1000
    image_size: int = 32
    _: KW_ONLY
    patch: int = 2
    dim: int = 384
    n_layers: int = 12
    n_heads: int = 6
    mixer: str | Sequence[str] = "power"
    degree: int | None = None
    expand: int = 2
    window: int = 8
    ffw_expand: int = 4
    local_conv: bool = True
    n_registers: int = 0
    two_times: bool = False

    def __post_init__(self):
        least = {"in_channels": 1, "n_classes": 0, "image_size": 1, "patch": 1, "dim": 4, "n_layers": 1, "n_heads": 1}
        check_at_least(vars(self), least | {"window": 1, "ffw_expand": 1, "n_registers": 0})
        if self.dim % 4:
            raise ValueError(f"dim: expected a multiple of 4 (sine and cosine of two axes), got {self.dim}")
        if self.image_size % self.patch:
            raise ValueError(f"image_size: expected a multiple of patch={self.patch}, got {self.image_size}")
        self.check_mixers(MIXERS)


@dataclass(frozen=True)
class VideoDiTConfig(ModelConfig):
    """The arguments of `VideoDiT`, which says what they mean. Raises ValueError if they do not make a model."""

    in_channels: int = 16
    size: Sequence[int] = (32, 32)
    length: int = 16
    _: KW_ONLY
    text_dim: int = 0
    n_classes: int = 0
    patch: Sequence[int] = (2, 2, 2)
    dim: int = 384
    n_layers: int = 12
    n_heads: int = 6
    mixer: str | Sequence[str] = "power"
    degree: int | None = None
    expand: int = 2
    ffw_expand: int = 4
    local_conv: bool | str | int | None | Sequence[bool | str | int | None] = True
    positions: str = "sincos"
    read: str = "shared"
    fade: str | None = None
    sink: int = 0
    space_groups: int = 1
    two_times: bool = False
    time_frequency: float | None = None

    @property
    def conv_frames(self) -> list[int | None]:
        """For every layer the number of earlier frames that its local convolution sees; None without."""
        given = self.local_conv
        each = list(given) if isinstance(given, list | tuple) else [given] * self.n_layers
        return [self._earlier(value) for value in each]

    @staticmethod
    def _earlier(value: Any) -> Any:
        """The number that a value of `local_conv` stands for, None for no convolution; others as they are."""
        if isinstance(value, bool):  # those of 0.1
            return MOST_EARLIER if value else None
        return NAMED_FRAMES.get(value, value) if isinstance(value, str) else value

    @property
    def fastest(self) -> float:
        """The highest frequency of the time embedding."""
        if self.time_frequency is None:
            return SMOOTH if self.two_times else 1.0
        return self.time_frequency

    @classmethod
    def from_file(cls, stored: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a file, with those that models had before there was a choice."""
        added = {
            "read": "shared",
            "fade": None,
            "sink": 0,
            "space_groups": 1,
            "two_times": False,
            "time_frequency": None,
        }
        return added | stored

    def __post_init__(self):
        size, patch = check_integers("size", self.size, 2), check_integers("patch", self.patch, 3)
        least = {"in_channels": 1, "length": 1, "text_dim": 0, "n_classes": 0, "dim": 8, "n_layers": 1, "n_heads": 1}
        check_at_least(vars(self), least | {"ffw_expand": 1})
        for name, pixels, unit in zip(("length", "size", "size"), (self.length, *size), patch, strict=True):
            if pixels % unit:
                got = self.length if name == "length" else size
                raise ValueError(f"{name}: expected a multiple of the patch (t, h, w) = {tuple(patch)}, got {got}")
        if self.dim % 8:
            raise ValueError(f"dim: expected a multiple of 8 (sine and cosine of three axes), got {self.dim}")
        self.check_mixers(FRAME_MIXERS)
        self._check_memory()
        if not 0 < self.fastest < math.inf:
            raise ValueError(f"time_frequency: expected a positive number or None, got {self.time_frequency}")
        if self.positions not in POSITIONS:
            raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {self.positions!r}")
        if self.positions == "rotary" and not any(kind.endswith("power") for kind in self.mixers):
            raise ValueError(
                f"positions: 'rotary' turns the features of mixer='power', and there is none in {self.mixer!r}"
            )

    def _check_memory(self):
        """ValueError unless the arguments on what is kept of earlier frames go together."""
        if self.read not in READS:
            raise ValueError(f"read: expected 'shared' or 'split', got {self.read!r}")
        if self.fade not in FADES or (self.fade is not None and self.read == "shared"):
            raise ValueError(
                f"fade: expected None, or with read='split' also 'head' or 'gated', got {self.fade!r} with "
                f"read={self.read!r}"
            )
        for name, none in (("sink", 0), ("space_groups", 1)):
            given = getattr(self, name)
            if not is_integer(given) or given < none:
                raise ValueError(f"{name}: expected an integer of at least {none}, got {given!r}")
            if given != none and self.read == "shared":
                raise ValueError(
                    f"{name}: expected {none} with read='shared', got {given}; read='split' has a gate for it"
                )
        if self.sink > self.length // self.patch[0]:
            raise ValueError(
                f"sink: expected at most the {self.length // self.patch[0]} frames of tokens of a training clip, "
                f"got {self.sink}"
            )
        check_blocks(self.space_groups, self.size[0] // self.patch[1], self.size[1] // self.patch[2])
        each = self.conv_frames
        if len(each) != self.n_layers:
            raise ValueError(f"local_conv: expected one for each of n_layers={self.n_layers} layers, got {len(each)}")
        for value in each:
            if value is not None and not (is_integer(value) and 0 <= value <= MOST_EARLIER):
                raise ValueError(
                    f"local_conv: expected 'frame', 'clip', None, or 0 to {MOST_EARLIER} earlier frames, got {value!r}"
                )


# Whose arguments these are, if one is unknown.
ImageDiTConfig.__init__.__qualname__ = "ImageDiT.__init__"
VideoDiTConfig.__init__.__qualname__ = "VideoDiT.__init__"
