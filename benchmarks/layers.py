"""Cases of the whole layer, beside attention and beside the matrix products that it cannot do without."""

import copy
import importlib.util
from dataclasses import dataclass
from unittest import mock

import torch

from pom_ext import PoM
from pom_ext.ops import _blocks
from pom_ext.ops.projected import project

from .baselines import Attention, plain_layer
from .measure import OURS, Setup, Target, as_tuple, forward, measure_times, training_step
from .ops import short

AUTHORS = ("authors",) if importlib.util.find_spec("pom") else ()  # davidpicard/pom


@dataclass(frozen=True)
class LayerCase:
    """`PoM` mixing x (batch, tokens, dim) with itself: the forward, or with `train` the forward and all gradients.

    heads: gates of the power form (1: one for every channel). The attention beside it has heads of 64 channels.
    memory: what is kept for the gradients, as of `PoM`.
    """

    form: str
    degree: int
    tokens: int
    train: bool = False
    dim: int = 512
    expand: int = 2
    heads: int = 1
    dtype: torch.dtype = torch.float32
    batch: int = 1
    memory: str = "store"
    device: str = "cpu"
    clock: str = "host"
    against: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    bytes_moved = None  # a layer is bound by its matrix products

    @property
    def name(self):
        heads = f"-heads{self.heads}" if self.heads > 1 else ""
        batch = f"-B{self.batch}" if self.batch > 1 else ""
        what = ("layer_train" if self.memory == "store" else "layer_recompute") if self.train else "layer"
        return f"{what}-{self.form}{self.degree}{heads}{batch}-N{self.tokens}-D{self.dim}-{short(self.dtype)}"

    @property
    def differentiates(self):
        return self.train

    def contender(self, function, modules, **inputs):
        if not self.train:
            return forward(function, [inputs])
        return training_step(function, [inputs], parameters=[p for module in modules for p in module.parameters()])

    def setup(self, sets=1):
        layer = PoM(self.dim, self.degree, self.expand, form=self.form, n_sel_heads=self.heads,
                    memory=self.memory)  # fmt: skip
        layer = layer.to(self.device, self.dtype)
        x = torch.randn(self.batch, self.tokens, self.dim, device=self.device).to(self.dtype)
        projections = layer.context_proj, layer.gate_proj, layer.out_proj

        def projected():
            mixed = torch.randn(self.batch, self.tokens, layer.state_width, device=self.device).to(self.dtype)

            def products(x, mixed):
                return layer.context_proj(x), layer.gate_proj(x), layer.out_proj(mixed)

            return self.contender(products, projections, x=x, mixed=mixed)

        def plain(x):
            return plain_layer(layer, x)

        def recomputing(at_once):
            module = copy.deepcopy(layer)
            module.memory = "recompute"

            def run(x):
                with mock.patch.object(_blocks, "AT_ONCE", at_once):
                    return module(x)

            return self.contender(run, [module], x=x)

        def attention():
            module = Attention(self.dim, max(1, self.dim // 64)).to(self.device, self.dtype)
            return self.contender(lambda x: module(x), [module], x=x)

        def authors():
            from pom import PoM as AuthorsPoM

            module = AuthorsPoM(self.dim, self.degree, self.expand, n_groups=1, n_sel_heads=self.heads)
            module = module.to(self.device, self.dtype)
            return self.contender(lambda x: module(x), [module], x=x)

        return Setup(
            {"x": x},
            {
                OURS: lambda: self.contender(lambda x: layer(x), [layer], x=x),
                "plain": lambda: self.contender(plain, [layer], x=x),
                "compiled": lambda: self.contender(torch.compile(plain, dynamic=False), [layer], x=x),
                "by blocks": lambda: recomputing(at_once=False),
                "at once": lambda: recomputing(at_once=True),
                "attention": attention,
                "authors": authors,
                "projections": projected,
                "context projection": lambda: forward(lambda: layer.context_proj(x), [{}]),
                "the same by oneDNN": lambda: forward(lambda: project(layer.context_proj, x), [{}]),
            },
            lambda: self.expected(layer, x),
        )

    def expected(self, layer, x):
        exact = copy.deepcopy(layer).double()
        return as_tuple(self.contender(lambda x: plain_layer(exact, x), [exact], x=x.double()).call())

    def sizes(self, tensors):
        """What the memory of a forward is held against: its output, its state, and 4 MiB of scratch."""
        channels = self.dim * self.expand * (self.degree if self.form == "product" else 1)
        return {"allowed": tensors["x"].nbytes + self.batch * (8 * channels + 8) + 4 * 2**20}

    def measure(self, clock, settings, bandwidth=None):
        return measure_times(self, clock, settings, bandwidth)
