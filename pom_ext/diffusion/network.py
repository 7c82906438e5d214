"""What objectives, losses and guidance need of a model; no model class is imported here."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Network(Protocol):
    """A model of `pom_ext.models`, or any other with the same call.

    Attributes:
        config: its arguments. "n_classes" is used, and if present "two_times". Video models have "length" and "patch".
    """

    config: dict[str, Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The prediction, of the shape of the noisy input."""
        ...
