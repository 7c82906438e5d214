"""The streams of the C and C++ library, for numpy arrays and DLPack tensors (torch, CuPy, JAX). Needs no torch.

`Stream` wraps the stream of csrc/include/pom/engine.h that a C++ program embeds, so tests in Python test that stream.
"""

import ctypes
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ._io import atomic_write

FORMS = ("product", "power")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Layer:
    """One polynomial mixer.

    Args:
        width: channels E of one polynomial factor; a state has C = degree * width channels in product form, width in
            power form.
        form, degree: as in `PoM`.
        heads: 1: a gate per channel; more: a gate per head of C / heads channels.
        dtype: dtype of features, gates and outputs. Sums are float32, or float64 if dtype is float64.
        kept: extra bytes beside the state, for anything else that the program caches for this layer (`Stream.kept`).
    """

    width: int
    form: str = "product"
    degree: int = 2
    heads: int = 1
    dtype: str = "float32"
    kept: int = 0

    @property
    def channels(self):
        """C, the width of the state."""
        return self.width * (self.degree if self.form == "product" else 1)

    def _numbers(self):
        for name, value, known in (("form", self.form, FORMS), ("dtype", self.dtype, DTYPES)):
            if value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
        sizes = {"width": self.width, "heads": self.heads, "degree": self.degree}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        return FORMS.index(self.form), self.degree, DTYPES.index(self.dtype), self.heads, self.width, self.kept


class Stream:
    """The states of all layers of a model, for a batch of videos and every evaluation of a frame.

    Array arguments (u, gate, ...) are on the stream's device and support DLPack. Their last dimension is contiguous;
    other strides are arbitrary but not negative. They are not copied.

    Args:
        layers: a `Layer` per layer of the model.
        batch: number of videos; with guidance twice this number.
        evaluations: 1; for models trained with shared noise the number of model evaluations per frame.
        allocate: function that allocates n bytes as a 1-D uint8 array, such as
            `lambda n: torch.empty(n, dtype=torch.uint8, device="cuda")`. None: numpy arrays.

    Raises:
        ImportError: there is no compiled engine.
        ValueError: a layer, batch or evaluations is out of range.
    """

    def __init__(self, layers, batch=1, evaluations=1, *, allocate=None):
        self.layers, self.batch, self.evaluations = tuple(layers), batch, evaluations
        self._allocate = allocate or (lambda size: np.empty(size, np.uint8))
        if not self.layers:
            raise ValueError("layers: expected at least one Layer")
        for name, number in (("batch", batch), ("evaluations", evaluations)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {number!r}")
        numbers = [layer._numbers() for layer in self.layers]
        self._stream = _compiled().Stream(numbers, batch, evaluations, self._allocate)

    def peek(self, layer, u, gate, coeff=None, *, weight=None, rotary=None, gate_rotary=None, evaluation=0, out=None):
        """Read the state with the frame added. The state does not change.

        Args:
            layer, evaluation: indices, from 0.
            u: (B, N, C) projected context.
            gate: (B, M, C), or (B, M, heads).
            coeff: (E, degree) float32 (float64 if the layer's dtype is float64), power form only.
            weight: (B, N), weight of every token; None: all one.
            rotary, gate_rotary: (cos, sin, axes), as `pom_ext.ops.rotary_table` returns them.
            out: (B, M, C) array to write to; None: a new numpy array.

        Returns:
            (B, M, C), the array `out` if one was passed.

        Raises:
            TypeError, ValueError, IndexError: wrong type, shape, device or range of an argument. Nothing is written.
        """
        return self._stream.frame(layer, u, gate, coeff, weight, rotary, gate_rotary, evaluation, out, False)

    def commit(
        self, layer, u, gate=None, coeff=None, *, weight=None, rotary=None, gate_rotary=None, evaluation=0, out=None
    ):
        """Add the frame to the state and read it, as `peek`. With gate=None only add it, and return None."""
        return self._stream.frame(layer, u, gate, coeff, weight, rotary, gate_rotary, evaluation, out, True)

    def step(
        self,
        layer,
        x,
        in_weight,
        out_weight,
        *,
        in_bias=None,
        out_bias=None,
        coeff=None,
        rotary=None,
        gate_rotary=None,
        evaluation=0,
        commit=False,
        out=None,
    ):
        """Run a whole layer on the CPU: tokens x mix with each other and with the state.

        Args:
            x: (B, N, D) tokens of the frame.
            in_weight, in_bias: (C + gates, D) and (C + gates,) or None: the context, then the gate projection.
            out_weight, out_bias: (D, C) and (D,) or None.
            commit: whether to add the frame to the state.
            layer, coeff, rotary, gate_rotary, evaluation, out: as in `peek`.

        Returns:
            (B, N, D)
        """
        return self._stream.step(
            layer, x, in_weight, out_weight, in_bias, out_bias, coeff, rotary, gate_rotary, evaluation, out, commit
        )

    def state(self, layer, evaluation=0):
        """Copies of a state's total (B, C), residual (B, C) and count (B,). Only for a stream on the CPU."""
        *addresses, _ = self._addresses(layer, evaluation)
        acc = np.float64 if self.layers[layer].dtype == "float64" else np.float32
        sums = (self.batch, self.layers[layer].channels)
        shapes = ((sums, acc), (sums, acc), ((self.batch,), np.float64))
        return tuple(_view(address, *shape).copy() for address, shape in zip(addresses, shapes, strict=True))

    def kept(self, layer, evaluation=0):
        """The extra bytes beside a state as a writable uint8 array, valid as long as the stream. Only on the CPU."""
        return _view(self._addresses(layer, evaluation)[-1], (self.layers[layer].kept,), np.uint8)

    def fork(self):
        """A copy of the stream."""
        fork = Stream(self.layers, self.batch, self.evaluations, allocate=self._allocate)
        fork.cuda_stream = self.cuda_stream
        self._stream.copy_to(fork._stream)
        return fork

    def rewind(self, kept):
        """Restore the state of `kept`, a fork of this stream."""
        kept._stream.copy_to(self._stream)

    def reset(self):
        """Make the stream empty."""
        self._stream.reset()

    def save(self, path):
        """Write the stream to a file with a version and a checksum, completely or not at all."""
        with atomic_write(path) as aside:
            aside.write_bytes(self._stream.save())

    def load(self, path):
        """Restore a stream that `save` wrote. Raises ValueError if the file is damaged or of another shape."""
        try:
            self._stream.load(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"path: {path}: {error}") from None

    @property
    def cuda_stream(self):
        """The CUDA stream, as a number, that a stream on a GPU queues its kernels on; 0: the default stream."""
        return self._stream.cuda_stream

    @cuda_stream.setter
    def cuda_stream(self, stream):
        self._stream.cuda_stream = stream

    def _addresses(self, layer, evaluation):
        if self._stream.on_gpu:
            raise ValueError("state: this stream lies on a GPU; save it to look at what it remembers")
        return self._stream.state(layer, evaluation)


def _view(address, shape, dtype):
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not size:
        return np.empty(shape, dtype)
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


def _compiled():
    try:
        from . import _engine
    except ImportError as error:
        build = "Build it from the source folder: pip install --no-build-isolation -e ."
        here = sysconfig.get_config_var("SOABI")
        built = sorted(path.name.split(".")[1] for path in Path(__file__).parent.glob("_engine.*.so"))
        if built and here not in built:
            raise ImportError(
                f"pom_ext.engine: the compiled engine is for {' and '.join(built)}, and this Python is {here}. A wheel "
                f"holds the engine for the one version of Python that it was built with, and all else for every one. "
                f"{build}"
            ) from None
        raise ImportError(f"pom_ext.engine: there is no compiled engine for this Python ({error}). {build}") from None
    return _engine
