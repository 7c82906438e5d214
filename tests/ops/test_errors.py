"""Bad input: the message names the argument and what was given, and nothing is computed."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pom_ext import PoM, State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.ops import rotary_table
from pom_ext.ops.arguments import call as call_operation

U, GATE = torch.zeros(2, 6, 8), torch.zeros(2, 6, 8)  # 8 channels: product form of degree 2, power form of width 8
COEFF = torch.zeros(8, 3)
TABLE = rotary_table(torch.arange(6), 8, 1)
META = {"device": "meta"}


def state(batch=2, width=8, groups=1, **options):
    return State.empty(batch, width, groups, **options)


def product(**changes):
    return polynomial_mix(**{"u": U, "gate": GATE, "form": "product", "degree": 2} | changes)


def power(**changes):
    return polynomial_mix(**{"u": U, "gate": GATE, "coeff": COEFF, "form": "power", "degree": 3} | changes)


def state_of(**changes):
    return polynomial_state(**{"u": U, "form": "product", "degree": 2} | changes)


def readout(**changes):
    return polynomial_readout(**{"gate": GATE, "state": state(), "form": "product"} | changes)


def update(**changes):
    return polynomial_update(**{"u": U, "gate": GATE, "state": state(), "form": "product", "degree": 2} | changes)


def layer(dim=8, x=(2, 6, 8), context=None, arguments=None, **options):
    """A layer built and called."""
    context = None if context is None else torch.zeros(context)
    return PoM(dim, **options)(torch.zeros(x), context, **(arguments or {}))


def shape(*sizes, **options):
    return torch.zeros(sizes, **options)


# What is wrong: the call, the arguments that make it so, the error, and what its message must hold, in this order.
CASES = {
    # form and degree
    "form unknown": (product, {"form": "cubic"}, ValueError, "form", "'cubic'"),
    "form of another type": (product, {"form": 2}, ValueError, "form", "2"),
    "degree 0": (product, {"degree": 0}, ValueError, "degree", "1 to 16", "0"),
    "degree 17": (product, {"degree": 17, "u": shape(2, 6, 34), "gate": shape(2, 6, 34)}, ValueError, "degree", "17"),
    "degree negative": (power, {"degree": -1}, ValueError, "degree", "-1"),
    "degree fractional": (product, {"degree": 1.5}, (ValueError, TypeError), "degree", "1.5"),
    # u
    "u a list": (product, {"u": [[1.0]]}, TypeError, "u", "list"),
    "u None": (state_of, {"u": None}, TypeError, "u", "NoneType"),
    "u with two dimensions": (product, {"u": shape(6, 8)}, ValueError, "u", "(6, 8)"),
    "u with four dimensions": (state_of, {"u": shape(2, 6, 8, 1)}, ValueError, "u", "(2, 6, 8, 1)"),
    "u of integers": (state_of, {"u": U.long()}, TypeError, "u", "int64"),
    "u complex": (state_of, {"u": U.cfloat()}, TypeError, "u", "complex64"),
    "u not divisible by the degree": (state_of, {"degree": 3}, ValueError, "u", "3", "8"),
    "u without channels": (state_of, {"u": shape(2, 6, 0)}, ValueError, "u", "(2, 6, 0)"),
    "u without channels, power": (power, {"u": shape(2, 6, 0), "coeff": shape(0, 3)}, ValueError, "u", "(2, 6, 0)"),
    # coeff
    "coeff missing": (power, {"coeff": None}, (ValueError, TypeError), "coeff", "(8, 3)", "None"),
    "coeff in the product form": (product, {"coeff": COEFF}, ValueError, "coeff", "product"),
    "coeff transposed": (power, {"coeff": COEFF.T}, ValueError, "coeff", "(8, 3)", "(3, 8)"),
    "coeff of another degree": (power, {"degree": 4}, ValueError, "coeff", "(8, 4)", "(8, 3)"),
    "coeff of integers": (power, {"coeff": COEFF.int()}, TypeError, "coeff", "int32"),
    "coeff a list": (power, {"coeff": [[1.0]]}, TypeError, "coeff", "list"),
    "coeff on another device": (power, {"coeff": shape(8, 3, **META)}, ValueError, "coeff", "cpu", "meta"),
    # gate
    "gate a float": (product, {"gate": 1.0}, TypeError, "gate", "float"),
    "gate with two dimensions": (product, {"gate": shape(6, 8)}, ValueError, "gate", "(6, 8)"),
    "gate of another width": (product, {"gate": shape(2, 6, 7)}, ValueError, "gate", "8", "(2, 6, 7)"),
    "gate of another batch": (product, {"gate": shape(3, 6, 8)}, ValueError, "gate", "2", "(3, 6, 8)"),
    "gate of another dtype": (product, {"gate": GATE.bfloat16()}, TypeError, "gate", "float32", "bfloat16"),
    "gate of integers": (readout, {"gate": GATE.int()}, TypeError, "gate", "int32"),
    "gate on another device": (product, {"gate": shape(2, 6, 8, **META)}, ValueError, "gate", "cpu", "meta"),
    "gate per channel with heads": (product, {"n_sel_heads": 4}, ValueError, "gate", "4", "(2, 6, 8)"),
    "gate of other length, causal": (product, {"gate": shape(2, 5, 8), "causal": True}, ValueError, "gate", "6", "(2, 5, 8)"),
    "gate of other length, frames": (product, {"gate": shape(2, 5, 8), "frames": 3}, ValueError, "gate", "6", "(2, 5, 8)"),
    "gate of other length, packed": (
        product, {"gate": shape(2, 5, 8), "cu_seqlens": [0, 6]}, ValueError, "gate", "6", "(2, 5, 8)",
    ),
    "heads that do not divide": (product, {"n_sel_heads": 3, "gate": shape(2, 6, 3)}, ValueError, "n_sel_heads", "8", "3"),
    "no heads": (product, {"n_sel_heads": 0}, ValueError, "n_sel_heads", "0"),
    "heads fractional": (product, {"n_sel_heads": 2.0}, (ValueError, TypeError), "n_sel_heads", "2.0"),
    # weight and mask
    "weight a list": (product, {"weight": [1.0]}, TypeError, "weight", "list"),
    "weight of another length": (product, {"weight": shape(2, 5)}, ValueError, "weight", "(2, 6)", "(2, 5)"),
    "weight of another batch": (product, {"weight": shape(1, 6)}, ValueError, "weight", "(2, 6)", "(1, 6)"),
    "weight negative": (product, {"weight": shape(2, 6) - 0.5}, ValueError, "weight", "-0.5"),
    "weight negative integer": (state_of, {"weight": shape(2, 6).long() - 3}, ValueError, "weight", "-3"),
    "weight negative, causal": (product, {"weight": shape(2, 6) - 0.5, "causal": True}, ValueError, "weight", "-0.5"),
    "weight complex": (product, {"weight": shape(2, 6).cfloat()}, TypeError, "weight", "complex64"),
    "weight to be learned": (product, {"weight": shape(2, 6, requires_grad=True)}, ValueError, "weight", "detach"),
    "weight on another device": (product, {"weight": shape(2, 6, **META)}, ValueError, "weight", "cpu", "meta"),
    "mask without queries": (product, {"mask": shape(2, 6)}, ValueError, "mask", "(2, 6)"),
    "mask of other queries": (product, {"mask": shape(2, 5, 6)}, ValueError, "mask|gate", "5", "6"),
    "mask of other tokens": (product, {"mask": shape(2, 6, 5)}, ValueError, "mask", "6", "(2, 6, 5)"),
    "mask negative": (state_of, {"mask": shape(2, 3, 6) - 1}, ValueError, "mask", "-1"),
    "mask to be learned": (product, {"mask": shape(2, 6, 6, requires_grad=True)}, ValueError, "mask", "detach"),
    "mask a string": (product, {"mask": "causal"}, TypeError, "mask", "str"),
    # one context at a time
    "mask and causal": (product, {"mask": shape(2, 6, 6), "causal": True}, ValueError, "mask and causal|causal and mask"),
    "mask and frames": (product, {"mask": shape(2, 6, 6), "frames": 3}, ValueError, "mask", "frames"),
    "mask and cu_seqlens": (product, {"mask": shape(2, 6, 6), "cu_seqlens": [0, 6]}, ValueError, "mask", "cu_seqlens"),
    "mask and weight": (product, {"mask": shape(2, 6, 6), "weight": shape(2, 6)}, ValueError, "mask", "weight"),
    "causal and frames": (product, {"causal": True, "frames": 3}, ValueError, "causal", "frames"),
    "causal and cu_seqlens": (product, {"causal": True, "cu_seqlens": [0, 6]}, ValueError, "causal", "cu_seqlens"),
    "frames and cu_seqlens": (state_of, {"frames": 3, "cu_seqlens": [0, 6]}, ValueError, "frames", "cu_seqlens"),
    "frames and cu_seqlens, readout": (readout, {"frames": 6, "cu_seqlens": [0, 6]}, ValueError, "frames", "cu_seqlens"),
    "state and mask": (product, {"state": state(), "mask": shape(2, 6, 6)}, ValueError, "state", "mask"),
    "state and cu_seqlens": (product, {"state": state(), "cu_seqlens": [0, 6]}, ValueError, "state", "cu_seqlens"),
    "return_state and mask": (product, {"return_state": True, "mask": shape(2, 6, 6)}, ValueError, "return_state", "mask"),
    "return_state and cu_seqlens": (
        product, {"return_state": True, "cu_seqlens": [0, 6]}, ValueError, "return_state", "cu_seqlens",
    ),
    # frames and cu_seqlens
    "frames that do not divide": (product, {"frames": 4}, ValueError, "frames", "6", "4"),
    "frames of no length": (product, {"frames": 0}, ValueError, "frames", "0"),
    "frames negative": (product, {"frames": -3}, ValueError, "frames", "-3"),
    "frames fractional": (product, {"frames": 1.5}, (ValueError, TypeError), "frames", "1.5"),
    "frames that end early": (product, {"frames": [0, 3, 5]}, ValueError, "frames", "6", "[0, 3, 5]"),
    "frames that end late": (state_of, {"frames": (0, 3, 7)}, ValueError, "frames", "6", "7"),
    "frames that start late": (product, {"frames": [1, 3, 6]}, ValueError, "frames", "0", "[1, 3, 6]"),
    "frames that go back": (product, {"frames": [0, 4, 3, 6]}, ValueError, "frames", "[0, 4, 3, 6]"),
    "frames as lengths": (product, {"frames": [3, 3]}, ValueError, "frames", "[3, 3]"),
    "frames of nothing": (product, {"frames": []}, ValueError, "frames", "[]"),
    "frames in two dimensions": (product, {"frames": torch.tensor([[0, 6]])}, ValueError, "frames", "(1, 2)"),
    "frames of floats": (product, {"frames": torch.tensor([0.0, 6.0])}, (ValueError, TypeError), "frames", "float32"),
    "frames of fractions": (product, {"frames": [0, 2.5, 6]}, (ValueError, TypeError), "frames", "2.5"),
    "sequences that end early": (product, {"cu_seqlens": [0, 3, 5]}, ValueError, "cu_seqlens", "6", "[0, 3, 5]"),
    "sequences that go back": (state_of, {"cu_seqlens": [0, 4, 3, 6]}, ValueError, "cu_seqlens", "[0, 4, 3, 6]"),
    "sequences of floats": (product, {"cu_seqlens": torch.tensor([0.0, 6.0])}, (ValueError, TypeError), "cu_seqlens", "float32"),
    "sequences as one length": (product, {"cu_seqlens": 3}, (ValueError, TypeError), "cu_seqlens", "3|int"),
    # rotary
    "rotary in the product form": (product, {"rotary": TABLE}, ValueError, "rotary", "product"),
    "gate_rotary in the product form": (product, {"gate_rotary": TABLE}, ValueError, "gate_rotary", "product"),
    "rotary of other tokens": (
        power, {"rotary": rotary_table(torch.arange(5), 8, 1)}, ValueError, "rotary", "6", "5",
    ),
    "rotary too wide": (power, {"rotary": rotary_table(torch.arange(6), 10, 1)}, ValueError, "rotary", "5"),
    "gate_rotary of other queries": (
        power, {"gate_rotary": rotary_table(torch.arange(5), 8, 1)}, ValueError, "gate_rotary", "6", "5",
    ),
    "rotary without axes": (power, {"rotary": TABLE._replace(axes=0)}, ValueError, "rotary", "axes=0"),
    "rotary of odd columns": (power, {"rotary": TABLE._replace(axes=3)}, ValueError, "rotary", "axes=3"),
    "rotary halves differ": (power, {"rotary": TABLE._replace(sin=TABLE.sin[:, :2])}, ValueError, "rotary", "(6, 2)"),
    "rotary a tensor": (power, {"rotary": TABLE.cos}, TypeError, "rotary", "Tensor"),
    "rotary and gate_rotary of different axes, causal": (
        power, {"causal": True, "rotary": TABLE, "gate_rotary": TABLE._replace(axes=2)}, ValueError, "gate_rotary", "1", "2",
    ),
    # state
    "state a tensor": (product, {"state": shape(2, 1, 8)}, TypeError, "state", "Tensor"),
    "state of another batch": (product, {"state": state(batch=3)}, ValueError, "state", "2", "(3, 1, 8)"),
    "state of another width": (product, {"state": state(width=7)}, ValueError, "state", "8", "(2, 1, 7)"),
    "state of many groups": (product, {"state": state(groups=2)}, ValueError, "state", "1", "(2, 2, 8)"),
    "state of many groups, causal": (product, {"state": state(groups=2), "causal": True}, ValueError, "state", "(2, 2, 8)"),
    "state of another dtype": (
        product, {"state": state(dtype=torch.float64)}, (ValueError, TypeError), "state", "float32", "float64",
    ),
    "state on another device": (product, {"state": state(**META)}, ValueError, "state", "cpu", "meta"),
    # readout
    "readout of no state": (readout, {"state": shape(2, 1, 8)}, TypeError, "state", "Tensor"),
    "readout of another batch": (readout, {"state": state(batch=3)}, ValueError, "state|gate", "2", "3"),
    "readout of another width": (readout, {"state": state(width=9)}, ValueError, "gate", "9", "(2, 6, 8)"),
    "readout that does not deal": (readout, {"state": state(groups=4)}, ValueError, "gate", "6", "4"),
    "readout of other frames": (readout, {"state": state(groups=4), "frames": 3}, ValueError, "frames|state", "4", "2"),
    "readout of other sequences": (
        readout, {"state": state(groups=4), "cu_seqlens": [0, 6]}, ValueError, "cu_seqlens|state", "4", "1",
    ),
    "readout with heads that do not divide": (readout, {"n_sel_heads": 3}, ValueError, "n_sel_heads", "8", "3"),
    "readout form unknown": (readout, {"form": "cubic"}, ValueError, "form", "'cubic'"),
    "readout on another device": (readout, {"state": state(**META)}, ValueError, "state|gate", "cpu", "meta"),
    # update
    "update of no state": (update, {"state": shape(2, 1, 8)}, TypeError, "state", "Tensor"),
    "update of another batch": (update, {"state": state(batch=3)}, ValueError, "state.total", "2", "(3, 1, 8)"),
    "update of another width": (update, {"state": state(width=9)}, ValueError, "state.total", "8", "(2, 1, 9)"),
    "update of many groups": (update, {"state": state(groups=6)}, ValueError, "state.total", "1", "(2, 6, 8)"),
    "update in another dtype": (
        update, {"state": state(dtype=torch.float64)}, TypeError, "state.total", "float32", "float64",
    ),
    "update with a narrow residual": (
        update, {"state": State(shape(2, 1, 8), shape(2, 1, 7), shape(2, 1).double())}, ValueError, "state.residual", "7",
    ),
    "update with a narrow count": (
        update, {"state": State(shape(2, 1, 8), shape(2, 1, 8), shape(2, 1))}, TypeError, "state.count", "float64",
    ),
    "update of strided memory": (
        update, {"state": State(shape(2, 1, 16)[..., ::2], shape(2, 1, 8), shape(2, 1).double())},
        ValueError, "state.total", "contiguous", "clone",
    ),
    "update of one count for all": (
        update, {"state": State(shape(2, 1, 8), shape(2, 1, 8), shape(1, 1).double().expand(2, 1))},
        ValueError, "state.count", "contiguous", "clone",
    ),
    "update on another device": (update, {"state": state(**META)}, ValueError, "state.total", "cpu", "meta"),
    "update with a gate of another batch": (update, {"gate": shape(3, 6, 8)}, ValueError, "gate", "2", "(3, 6, 8)"),
    "update with a gate of another dtype": (update, {"gate": GATE.half()}, TypeError, "gate", "float32", "float16"),
    "update without coefficients": (update, {"form": "power"}, ValueError, "coeff", "(8, 2)", "None"),
    "update with a negative weight": (update, {"weight": shape(2, 6) - 1}, ValueError, "weight", "-1"),
    "update with a gradient": (
        update, {"u": shape(2, 6, 8, requires_grad=True)}, ValueError, "u", "no_grad", "polynomial_mix",
    ),
    # the layer's constructor
    "layer form": (layer, {"form": "cubic"}, ValueError, "form", "'cubic'"),
    "layer degree 0": (layer, {"degree": 0}, ValueError, "degree", "0"),
    "layer degree 17": (layer, {"degree": 17}, ValueError, "degree", "17"),
    "layer without width": (layer, {"dim": 0}, ValueError, "dim", "0"),
    "layer expand 0": (layer, {"expand": 0}, ValueError, "expand", "0"),
    "layer groups": (layer, {"n_groups": 3}, ValueError, "n_groups", "8", "3"),
    "layer no groups": (layer, {"n_groups": 0}, ValueError, "n_groups", "0"),
    "layer heads": (layer, {"n_sel_heads": 5}, ValueError, "n_sel_heads", "32", "5"),
    "layer rope unknown": (layer, {"form": "power", "rope": "4d"}, ValueError, "rope", "'4d'"),
    "layer rope, product": (layer, {"rope": "1d"}, ValueError, "rope", "power", "product"),
    "layer rope with few gates": (
        layer, {"form": "power", "rope": "3d", "n_sel_heads": 4}, ValueError, "rope", "6", "4",
    ),
    # and its call
    "layer tokens of another width": (layer, {"x": (2, 6, 7)}, ValueError, "x", "8", "(2, 6, 7)"),
    "layer tokens without batch": (layer, {"x": (6, 8)}, ValueError, "x", "(6, 8)"),
    "layer context of another width": (layer, {"context": (2, 4, 9)}, ValueError, "context", "8", "(2, 4, 9)"),
    "layer context of another batch": (layer, {"context": (3, 4, 8)}, ValueError, "context", "2", "(3, 4, 8)"),
    "layer positions unasked": (layer, {"arguments": {"positions": torch.arange(6)}}, ValueError, "positions", "rope"),
    "layer positions missing": (layer, {"form": "power", "rope": "2d"}, ValueError, "positions", "2d"),
    "layer positions of other tokens": (
        layer, {"form": "power", "rope": "1d", "arguments": {"positions": torch.arange(5)}},
        ValueError, "positions", "(6,)", "(5,)",
    ),
    "layer positions of other axes": (
        layer, {"form": "power", "rope": "2d", "arguments": {"positions": shape(6, 3)}},
        ValueError, "positions", "(6, 2)", "(6, 3)",
    ),
    "layer causal across": (
        layer, {"context": (2, 4, 8), "arguments": {"causal": True}}, ValueError, "gate|causal|context", "4", "6",
    ),
    # states
    "add a number": (lambda: state() + 1, {}, TypeError, "int"),
    "merge a tensor": (lambda: state().merge(U), {}, TypeError, "other", "Tensor"),
    "merge another batch": (lambda: state().merge(state(batch=3)), {}, ValueError, "other", "(2, 1, 8)", "(3, 1, 8)"),
    "merge another width": (lambda: state() + state(width=9), {}, ValueError, "(2, 1, 8)", "(2, 1, 9)"),
    "merge other groups": (lambda: state(groups=2) + state(groups=3), {}, ValueError, "(2, 2, 8)", "(2, 3, 8)"),
    "merge another dtype": (lambda: state() + state(dtype=torch.float64), {}, ValueError, "float32", "float64"),
    "merge another device": (lambda: state() + state(**META), {}, ValueError, "cpu", "meta"),
    "state_dict with a missing tensor": (
        lambda: State.from_state_dict({"total": U, "count": shape(2, 6)}), {}, ValueError, "residual",
    ),
}  # fmt: skip


class NothingIsComputed(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert op.namespace != "pom_ext", f"{op} ran before the arguments were checked"
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CASES)
def test_the_message_says_what_is_wrong(name):
    call, arguments, error, *words = CASES[name]
    with pytest.raises(error) as raised, NothingIsComputed():
        call(**arguments)
    pattern = ".*".join(f"({word})" if "|" in word else re.escape(word) for word in words)
    assert re.search(pattern, str(raised.value), re.DOTALL)


@pytest.mark.parametrize("call", (product, power, state_of, readout, update, layer))
def test_the_calls_are_right_but_for_what_the_table_changes(call):
    call()


def registered_update(device, **changes):
    """The registered operation itself, as a caller without this package's Python would use it."""
    arguments = {
        "u": U,
        "gate": GATE,
        "total": shape(2, 1, 8),
        "residual": shape(2, 1, 8),
        "count": shape(2, 1).double(),
        "arrival_counter": shape(2).int(),
        "degree": 2,
        "heads": 1,
    } | changes
    given = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return call_operation("update", given), [given[name] for name in ("total", "residual", "count", "arrival_counter")]


def test_the_registered_update(device):
    y, (_, _, count, counter) = registered_update(device)
    assert y.shape == U.shape and count.tolist() == [[6], [6]] and not counter.any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"total": shape(2, 1, 7)}, "total: unexpected shape"),
        ({"residual": shape(2, 1, 8).double()}, "residual: unexpected dtype"),
        ({"count": shape(2, 1)}, "count: unexpected dtype"),
        ({"arrival_counter": shape(2)}, "arrival_counter: unexpected dtype"),
        ({"arrival_counter": shape(1).int()}, "arrival_counter: unexpected shape"),
        ({"total": shape(8, 1, 2).permute(2, 1, 0)}, "total: expected a contiguous tensor"),
        ({"gate": shape(2, 6, 7)}, "gate: unexpected shape"),
        ({"gate": GATE.double()}, "dtypes of the arguments"),
        ({"heads": 3}, "heads: expected a divisor of 8"),
        ({"degree": 17}, "degree: expected 1 to 16"),
    ],
)
def test_registered_operations_keep_memory_safe(changes, message, device):
    with pytest.raises(RuntimeError, match=message):
        registered_update(device, **changes)
