"""What the tests of the ops share: the cases, the inputs of a case, the oracle, and the tolerance rule."""

import math
import random
from dataclasses import dataclass
from itertools import product

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pom_ext import State, polynomial_mix
from pom_ext.ops import Rotary, reference, rotary_table

FORMS = ("product", "power")
DEGREES = (1, 2, 3, 4, 5, 16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
FREE = ("whole", "weight", "mask")  # contexts whose queries need not be the context tokens
LINKED = ("frames", "frames_unequal", "causal", "cu_seqlens")
MODES = FREE + LINKED + tuple(f"{mode}+weight" for mode in LINKED)
SHAPES = (  # batch, tokens, width of one factor
    *((1, 1, 17), (3, 1, 100), (2, 7, 5), (5, 7, 1), (1, 7, 513), (2, 66, 33)),
    *((1, 129, 100), (3, 129, 17), (4, 129, 5), (1, 1031, 17), (2, 1000, 5), (1, 1031, 33)),
)
LARGEST = 60_000  # features of a drawn case, times the degree

# What rounding alone may cost: that of a result, and of every factor of a product. Half precision results are rounded
# once, and their factors need not be better than 2^-20. float64 has no more precise torch to be held against, so its
# floor also pays for adding up in another order.
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FACTOR_FLOOR = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-20, torch.float16: 2.0**-20}


def state_dtype(dtype):
    """What a state of such inputs is kept in, and what is accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Case:
    """One call of `polynomial_mix`."""

    form: str = "power"
    degree: int = 3
    mode: str = "whole"
    dtype: torch.dtype = torch.float32
    batch: int = 2
    tokens: int = 7
    width: int = 17  # E
    queries: int | None = None  # None: as many as tokens
    heads: int = 1
    axes: int = 0  # of the rotary positions, 0 for none
    prior: bool = False  # a state from before

    @property
    def channels(self):
        return self.width * (self.degree if self.form == "product" else 1)

    @property
    def returns_state(self):
        return self.mode.split("+")[0] not in ("mask", "cu_seqlens")

    def __str__(self):
        size = f"B{self.batch}-N{self.tokens}" + (f"-M{self.queries}" if self.queries else "") + f"-E{self.width}"
        extras = f"-h{self.heads}" * (self.heads > 1) + f"-{self.axes}d" * (self.axes > 0) + "-prior" * self.prior
        return f"{self.form}{self.degree}-{self.mode}-{size}{extras}-{str(self.dtype).removeprefix('torch.')}"


def grid(modes=MODES, forms=FORMS, degrees=DEGREES, dtypes=DTYPES):
    """Every mode with every form, degree and dtype; shape, gate, rotary and prior state are drawn, with a fixed seed."""
    draw, cases = random.Random(0), []
    for mode, form, degree, dtype in product(modes, forms, degrees, dtypes):
        batch, tokens, width = draw.choice([shape for shape in SHAPES if math.prod(shape) * degree <= LARGEST])
        channels = width * degree if form == "product" else width
        heads = draw.choice([heads for heads in (1, 2, 3, 10, 17) if channels % heads == 0])
        turned = heads if heads > 1 and mode.startswith("causal") else channels  # causal turns features and gates alike
        axes = draw.choice([axes for axes in (0, 0, 1, 2, 3) if form == "power" and 2 * axes <= turned] or [0])
        queries = draw.choice((None, 1, 40)) if mode in FREE else None
        prior = draw.random() < 0.3 and mode.split("+")[0] not in ("mask", "cu_seqlens")
        cases.append(Case(form, degree, mode, dtype, batch, tokens, width, queries, heads, axes, prior))
    return cases


@dataclass
class Inputs:
    """What a case calls with. `leaves` are differentiated: u, gate, and where there are any coeff and the prior total."""

    case: Case
    leaves: dict
    context: dict
    rotaries: dict
    prior_residual: torch.Tensor
    prior_count: torch.Tensor
    output_grads: dict  # of y, and of the total of the returned state


def draw_context(mode, batch, tokens, queries, dtype):
    """Keyword arguments of a context mode. Weights hold zeros, offsets an empty frame or sequence."""
    kind, _, weighted = mode.partition("+")
    cuts = [0, tokens // 4, tokens // 4, tokens - tokens // 3, tokens]
    context = {}
    if kind == "causal":
        context["causal"] = True
    elif kind == "frames":
        context["frames"] = next(length for length in (5, 3, 1) if tokens % length == 0)
    elif kind == "frames_unequal":
        context["frames"] = cuts
    elif kind == "cu_seqlens":
        context["cu_seqlens"] = torch.tensor(cuts)
    elif kind == "mask":
        context["mask"] = draw_weights(batch, queries, tokens, dtype=dtype)
    if kind == "weight" or weighted:
        context["weight"] = draw_weights(batch, tokens, dtype=dtype)
    return context


def draw_weights(*shape, dtype=torch.float32):
    """Weights of which some are zero, and all of the last row of each sample or of the last sample if there are more."""
    weights = torch.rand(shape) * (torch.rand(shape) < 0.7)
    if shape[-2] > 1:
        weights[..., -1, :] = 0
    return weights.to(dtype)


def draw_u(form, degree, shape):
    """Scaled so that every power of the polynomial has weight and float16 holds the highest one."""
    if degree > 5:
        return (1 + 0.4 * torch.randn(shape)).clamp(max=1.5)
    u = torch.randn(shape) * 1.5 + 0.5
    u.view(-1)[::51] = -12  # beyond the lower bound of the power form, the flat tail of the product form
    u.view(-1)[7::51] = 7 if form == "power" else 3  # beyond the upper bound; the product form has none
    return u


def draw_inputs(case):
    c, dtype = case, case.dtype
    queries = c.tokens if c.queries is None else c.queries
    gates = c.channels if c.heads == 1 else c.heads
    leaves = {
        "u": draw_u(c.form, c.degree, (c.batch, c.tokens, c.channels)).to(dtype),
        "gate": (torch.randn(c.batch, queries, gates) * 2).to(dtype),
    }
    if c.form == "power":
        scale = 1.3 if c.degree > 5 else 2.5
        leaves["coeff"] = (torch.randn(c.width, c.degree) / scale ** torch.arange(c.degree)).to(dtype)
    wide = state_dtype(dtype)
    total = torch.randn(c.batch, 1, c.channels, dtype=wide) * 3
    if c.prior:
        leaves["prior"] = total
    rotaries = {}
    if c.axes:
        rotaries["rotary"] = draw_rotary(c.tokens, c.channels, c.axes, wide)
        if gates >= 2 * c.axes:
            rotaries["gate_rotary"] = draw_rotary(queries, gates, c.axes, wide)
    return Inputs(
        case=c,
        leaves=leaves,
        context=draw_context(c.mode, c.batch, c.tokens, queries, dtype),
        rotaries=rotaries,
        prior_residual=total * torch.finfo(wide).eps / 4,
        prior_count=torch.full((c.batch, 1), 2.5, dtype=torch.float64),
        output_grads={
            "y": ((1 + torch.randn(c.batch, queries, c.channels)) / max(queries, 1) ** 0.5).to(dtype),
            "state": (1 + torch.randn_like(total)) / max(c.tokens, 1),
        },
    )


def draw_rotary(tokens, channels, axes, dtype=torch.float32):
    return rotary_table(torch.rand(tokens, axes) * 30, channels, axes, dtype=dtype)


def offsets(frames, tokens):
    """One frame length as the offsets that it stands for."""
    return list(range(0, tokens + 1, frames)) if isinstance(frames, int) else frames


def move(value, device=None, dtype=None):
    """Tensors inside dictionaries, tuples and Rotary tables to a device; floating ones to a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: move(entry, device, dtype) for key, entry in value.items()}
    if isinstance(value, Rotary):
        return Rotary(*(move(entry, device, dtype) for entry in value))
    return tuple(move(entry, device, dtype) for entry in value) if isinstance(value, tuple) else value


def with_gradients(function, leaves, output_grads):
    """The outputs of function(**leaves), a dictionary, and the gradients of all leaves."""
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    outputs = function(**leaves)
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), [output_grads[name] for name in outputs])
    results = outputs | {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: result.detach() for name, result in results.items()}


def prior_state(inputs, total, device="cpu"):
    """The state from before of a case, or None. Its residual holds more than float32 can."""
    if total is None:
        return None
    return State(total=total, residual=inputs.prior_residual.to(device), count=inputs.prior_count.to(device))


def draw_prior(batch, width, dtype=torch.float64):
    """Total, residual and count of a state with one group."""
    total = torch.randn(batch, 1, width, dtype=state_dtype(dtype)) * 10
    return total, total * torch.finfo(total.dtype).eps / 4, torch.rand(batch, 1, dtype=torch.float64)


class Launches(TorchDispatchMode):
    """The operations that a GPU would launch something for: all but those that make views and memory."""

    FREE = ("view", "slice", "select", "t", "transpose", "permute", "reshape", "empty", "new_empty", "empty_like",
            "_unsafe_view", "expand", "detach", "as_strided", "_reshape_alias")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__.split(".")[0]
        if name not in self.FREE:
            self.names.append(name)
        return operation(*args, **(kwargs or {}))


def reference_context(inputs, dtype):
    """Context and rotary positions as `reference` takes them."""
    context, rotaries = move((inputs.context, inputs.rotaries), "cpu", dtype)
    if "frames" in context:
        context["frames"] = offsets(context["frames"], inputs.case.tokens)
    return context, rotaries


def reference_state(inputs, u, coeff, prior):
    """Total and count by the definition, with what came before."""
    context, rotaries = reference_context(inputs, u.dtype)
    case, rotary = inputs.case, rotaries.get("rotary")
    total, count = reference.state(u, coeff, form=case.form, degree=case.degree, rotary=rotary, **context)
    if prior is not None:
        total = total + (prior + inputs.prior_residual.to("cpu", u.dtype))
        count = count + inputs.prior_count.to("cpu", u.dtype)
    return total, count


def op_function(inputs, device="cpu"):
    """`polynomial_mix` as a function of the leaves of a case."""
    case = inputs.case
    context, rotaries = move((inputs.context, inputs.rotaries), device)

    def mix(u, gate, coeff=None, prior=None):
        outputs = polynomial_mix(
            u, gate, coeff, form=case.form, degree=case.degree, n_sel_heads=case.heads,
            state=prior_state(inputs, prior, device), return_state=case.returns_state, **context, **rotaries,
        )  # fmt: skip
        return {"y": outputs[0], "state": outputs[1].total} if case.returns_state else {"y": outputs}

    return mix


def run_op(inputs, device="cpu"):
    """Outputs and gradients of `polynomial_mix`. The inputs keep their strides on their own device."""
    return with_gradients(op_function(inputs, device), move(inputs.leaves, device), move(inputs.output_grads, device))


def reference_function(inputs, dtype):
    """The same by the definition in plain torch, in `dtype` on the CPU."""
    case = inputs.case
    context, rotaries = reference_context(inputs, dtype)

    def mix(u, gate, coeff=None, prior=None):
        total, count = reference_state(inputs, u, coeff, prior)
        y = reference.readout(
            gate, total, count, form=case.form, n_sel_heads=case.heads, rotary=rotaries.get("gate_rotary"),
            query_offsets=context.get("frames", context.get("cu_seqlens")),
        )  # fmt: skip
        return {"y": y, "state": total[:, -1:]} if case.returns_state else {"y": y}

    return mix


def run_reference(inputs, dtype):
    """Outputs and gradients by the definition, run in `dtype` on the CPU."""
    mix = reference_function(inputs, dtype)
    return with_gradients(mix, move(inputs.leaves, "cpu", dtype), move(inputs.output_grads, "cpu", dtype))


def twice_differentiable_gate(gate, *, form):
    """`reference.gate_value`; torch itself has no second derivative of hardsigmoid."""
    if form == "product":
        return torch.sigmoid(gate)
    sixth = torch.tensor(1 / 6, dtype=torch.float32).to(gate.dtype)  # as torch's own slope, in float64 too
    line = torch.where((gate > -3) & (gate < 3), gate * sixth, 0)
    return torch.nn.functional.hardsigmoid(gate.detach()) + (line - line.detach())


def norm_error(result, exact):
    """Norm of the error relative to the norm of the exact values; absolute where these are zero."""
    scale = exact.norm()
    return ((result.cpu().double() - exact).norm() / (scale if scale > 0 else 1)).item()


def assert_accurate(results, exact, plain, case):
    """Every result is at most twice as far from the float64 values as plain torch is, plus a rounding floor.

    The factors of the product form and the coefficients of each power are compared one by one: the largest of them
    would hide an error in the others. (Not where so few numbers are left that all may happen to be sums that cancel.)
    """
    for name, result in results.items():
        assert result.shape == exact[name].shape, name
        if result.numel() == 0:
            continue
        parts = 1
        if case.width > 5 and (name == "grad coeff" or (case.form == "product" and result.shape[-1] == case.channels)):
            parts = case.degree
        compared = zip(*(t.chunk(parts, dim=-1) for t in (result, exact[name], plain[name])), strict=True)
        for i, (result_part, exact_part, plain_part) in enumerate(compared):
            plain_error = norm_error(plain_part, exact_part)
            assert plain_error < float("inf"), f"{name}: plain torch is no measure, its own error is {plain_error}"
            floor = FLOOR[result.dtype] + case.degree * FACTOR_FLOOR[case.dtype]
            error, bound = norm_error(result_part, exact_part), 2 * plain_error + floor
            assert error <= bound, (
                f"{name}, part {i}: error {error:.3g}, plain torch {plain_error:.3g}, bound {bound:.3g}"
            )


def check(inputs, device="cpu"):
    """Run a case on a device and hold all of its outputs and gradients against the definition."""
    results = run_op(inputs, device)
    exact, plain = run_reference(inputs, torch.float64), run_reference(inputs, inputs.case.dtype)
    assert_accurate(results, exact, plain, inputs.case)
