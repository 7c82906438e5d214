"""The streaming engine of the C and C++ library, on numpy arrays and DLPack tensors (torch, CuPy, JAX). Needs no torch.

A `Stream` here is the one that a C++ loop embeds (csrc/include/pom/engine.h): what is tested from Python is what ships.
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
        width: channels E of one polynomial factor; a state has C = degree * width in product form, width in power form.
        form, degree: as in `PoM`.
        heads: 1 for a gate per channel, more for one per head of C / heads channels.
        dtype: of features, gates and outputs; sums are kept in float32, and float64 for float64.
        kept: bytes beside the state for whatever else is remembered of this layer (`Stream.kept`).
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
        for name, given, known in (("form", self.form, FORMS), ("dtype", self.dtype, DTYPES)):
            if given not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
        sizes = {"width": self.width, "heads": self.heads, "degree": self.degree}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {size!r}")
        return FORMS.index(self.form), self.degree, DTYPES.index(self.dtype), self.heads, self.width, self.kept


class Stream:
    """The states of all layers of a model, for a batch of videos and every evaluation of a frame.

    Arguments named u, gate and so on are arrays on the stream's device that speak DLPack; the last dimension is side
    by side in memory, others may have any stride that is not negative. Nothing is copied.

    Args:
        layers: `Layer`s.
        batch: videos; with guidance twice as many.
        evaluations: 1; for models trained with shared noise as many as the solver asks the model in a frame.
        allocate: where the memory lies: a function of a number of bytes that returns so many as a 1-D uint8 array, such as
            `lambda n: torch.empty(n, dtype=torch.uint8, device="cuda")`. None takes numpy's.

    Raises:
        ImportError: there is no compiled engine.
        ValueError: a layer, a batch or evaluations outside what is said above.
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
        """Read the state with the frame added, and leave it as it was.

        Args:
            layer, evaluation: numbers from 0.
            u: (B, N, C) projected context.
            gate: (B, M, C), or (B, M, heads).
            coeff: (E, degree) float32 (float64 for float64), power form only.
            weight: (B, N) of every token; None: all one.
            rotary, gate_rotary: (cos, sin, axes) as `pom_ext.ops.rotary_table` makes them.
            out: (B, M, C) array to write to; None makes a numpy array.

        Returns:
            (B, M, C), which is `out` where it is given.

        Raises:
            TypeError, ValueError, IndexError: an argument of another type, shape, device or range. Nothing is written.
        """
        return self._stream.frame(layer, u, gate, coeff, weight, rotary, gate_rotary, evaluation, out, False)

    def commit(self, layer, u, gate=None, coeff=None, *, weight=None, rotary=None, gate_rotary=None, evaluation=0,
               out=None):  # fmt: skip
        """Add the frame to the state and read it, as `peek`; gate None adds it only, and returns None."""
        return self._stream.frame(layer, u, gate, coeff, weight, rotary, gate_rotary, evaluation, out, True)

    def step(self, layer, x, in_weight, out_weight, *, in_bias=None, out_bias=None, coeff=None, rotary=None,
             gate_rotary=None, evaluation=0, commit=False, out=None):  # fmt: skip
        """A whole layer of tokens x (B, N, D) that mix with each other and what came before, on the CPU.

        in_weight: (C + gates, D), the context projection and under it that of the gates; in_bias (C + gates,) or None.
        out_weight: (D, C); out_bias (D,) or None. Returns (B, N, D).
        """
        return self._stream.step(
            layer, x, in_weight, out_weight, in_bias, out_bias, coeff, rotary, gate_rotary, evaluation, out, commit
        )

    def state(self, layer, evaluation=0):
        """Copies of total (B, C), residual (B, C) and count (B,) of a stream on the CPU."""
        *addresses, _ = self._addresses(layer, evaluation)
        acc = np.float64 if self.layers[layer].dtype == "float64" else np.float32
        sums = (self.batch, self.layers[layer].channels)
        shapes = ((sums, acc), (sums, acc), ((self.batch,), np.float64))
        return tuple(_view(address, *shape).copy() for address, shape in zip(addresses, shapes))

    def kept(self, layer, evaluation=0):
        """The bytes that are kept beside a state, a writable uint8 array, of a stream on the CPU. Holds as long as the
        stream does."""
        return _view(self._addresses(layer, evaluation)[-1], (self.layers[layer].kept,), np.uint8)

    def fork(self):
        """Another stream that remembers the same."""
        fork = Stream(self.layers, self.batch, self.evaluations, allocate=self._allocate)
        fork.cuda_stream = self.cuda_stream
        self._stream.copy_to(fork._stream)
        return fork

    def rewind(self, kept):
        """Go back to where `kept`, a fork of this stream, stands."""
        kept._stream.copy_to(self._stream)

    def reset(self):
        """Back to the empty stream."""
        self._stream.reset()

    def save(self, path):
        """Write a small file with a version and a checksum, whole or not at all."""
        with atomic_write(path) as aside:
            aside.write_bytes(self._stream.save())

    def load(self, path):
        """Become what a stream was that `save` wrote; ValueError where the file is damaged, or of another shape."""
        try:
            self._stream.load(Path(path).read_bytes())
        except ValueError as error:
            raise ValueError(f"path: {path}: {error}") from None

    @property
    def cuda_stream(self):
        """The CUDA stream that the kernels of a stream on a GPU are queued on, as a number; 0 is the default one."""
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
