"""The update of a running state in place: a stream of frames gives what the mix of all tokens so far gives."""

from dataclasses import replace

import pytest
import torch
from cases import FORMS, Case, draw_inputs, draw_u, norm_error

from pom_ext import State, polynomial_mix, polynomial_update
from pom_ext.ops import reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# What sums in another order may cost, and in half precision the one rounding of the result.
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def frame_of(case, tokens, queries, weighted):
    """Inputs of one frame as keyword arguments of the ops; a frame without tokens too."""
    inputs = draw_inputs(replace(case, mode="weight" if weighted else "whole", tokens=tokens, queries=queries))
    return {**inputs.leaves, **inputs.context, **inputs.rotaries}


def options(case):
    return {"form": case.form, "degree": case.degree, "n_sel_heads": case.heads}


@pytest.mark.parametrize("weighted", (False, True), ids=("", "weighted"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case("product", 2, width=16),
        Case("product", 3, width=17),
        Case("product", 2, width=9, heads=6),
        Case("power", 3, width=64),
        Case("power", 5, width=33, heads=3, axes=1),
        Case("power", 2, width=64, axes=2),
        Case("power", 4, width=64, heads=4),
    ],
    ids=str,
)
def test_a_stream_is_the_mix_of_all_tokens_so_far(case, dtype, weighted, device):
    case = replace(case, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    coeff = {}
    state, total, count = State.empty(case.batch, case.channels, dtype=wide, device=device), 0.0, 0.0
    for tokens, queries in ((5, None), (1, 4), (0, 3), (130, 7), (1100, None)):
        frame = frame_of(case, tokens, queries, weighted and tokens > 0)
        coeff = coeff or {name: frame[name] for name in ("coeff",) if name in frame}
        frame |= coeff
        y = polynomial_update(state=state, **on(device, frame), **options(case))

        exact = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in frame.items()}
        rotaries = {name: exact.pop(name) for name in ("rotary", "gate_rotary") if name in exact}
        rotaries = {name: type(r)(r.cos.double(), r.sin.double(), r.axes) for name, r in rotaries.items()}
        gate = exact.pop("gate")
        of_frame = reference.state(
            exact.pop("u"), exact.pop("coeff", None), form=case.form, degree=case.degree,
            rotary=rotaries.get("rotary"), **exact,
        )  # fmt: skip
        total, count = total + of_frame[0], count + of_frame[1]
        wanted = reference.readout(
            gate, total, count, form=case.form, n_sel_heads=case.heads, rotary=rotaries.get("gate_rotary")
        )
        assert norm_error(y, wanted) < 2 * ALLOWED[dtype]
        # 16-bit inputs use a GELU that is good to 2^-20, once a factor.
        allowed = max(ALLOWED[wide], case.degree * 2.0**-20 if wide != dtype else 0)
        assert norm_error(state.total, total) < allowed
        assert torch.equal(state.count.cpu(), count) or norm_error(state.count, count) < 1e-7
        assert not state.ticket.any()


def on(device, arguments):
    def move(value):
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return type(value)(value.cos.to(device), value.sin.to(device), value.axes)  # Rotary

    return {name: move(value) for name, value in arguments.items()}


@pytest.mark.parametrize("tokens", (9, 1500))
@pytest.mark.parametrize("form", FORMS)
def test_update_writes_where_the_state_is(form, tokens, device):
    """Same memory, and the numbers that polynomial_mix makes anew."""
    case = Case(form, 2, tokens=tokens, width=16)
    frame = on(device, frame_of(case, tokens, None, False))
    before = polynomial_mix(**frame, **options(case), return_state=True)[1]
    y, after = polynomial_mix(**frame, **options(case), state=before, return_state=True)
    kept = before.clone()
    addresses = [tensor.data_ptr() for tensor in before.state_dict().values()]
    assert torch.equal(polynomial_update(state=before, **frame, **options(case)), y)
    assert [tensor.data_ptr() for tensor in before.state_dict().values()] == addresses
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, getattr(before, name)), name
    assert kept.ticket.data_ptr() != before.ticket.data_ptr()  # forks are independent
    assert torch.equal(polynomial_update(state=kept, **frame, **options(case)), y)


@pytest.mark.parametrize("form", FORMS)
def test_a_long_stream_loses_nothing(form, device):
    """10,000 frames in float32: the mean is that of float64 to 1e-6, and the state takes the memory it took at first."""
    frames = draw_u(form, 2, (50, 1, 3, 8)).to(device)
    gate = torch.zeros(1, 1, 8, device=device)
    coeff = torch.tensor([[0.5, -0.25]]).expand(8, 2).contiguous().to(device) if form == "power" else None
    state = State.empty(1, 8, device=device)
    for i in range(10_000):
        polynomial_update(frames[i % 50], gate, state, coeff, form=form, degree=2)
    exact_coeff = None if coeff is None else coeff.cpu().double()
    exact, _ = reference.state(frames.cpu().double().flatten(0, 2)[None], exact_coeff, form=form, degree=2)
    assert state.count.item() == 30_000
    assert norm_error(state.mean(), exact / 150) < 1e-6
    assert sum(tensor.numel() for tensor in state.state_dict().values()) == 17


@pytest.mark.parametrize("name", ("u", "gate", "coeff", "state.total"))
def test_no_gradient_is_promised(name, device):
    case = Case("power", 2, width=8)
    frame, state = on(device, frame_of(case, 3, None, False)), State.empty(2, 8, device=device)
    tensor = state.total if name == "state.total" else frame[name]
    tensor.requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: .*no gradient.*polynomial_mix"):
        polynomial_update(state=state, **frame, **options(case))
    assert state.count.sum() == 0
    with torch.no_grad():
        polynomial_update(state=state, **frame, **options(case))
    assert state.count.sum() == 6


def test_backward_after_an_update_raises_instead_of_using_the_new_state(device):
    """The mix keeps its state for the backward pass; whoever overwrites it in between must hear of it."""
    case = Case("product", 2, width=8)
    frame = on(device, frame_of(case, 5, None, False))
    y, state = polynomial_mix(**frame | {"gate": frame["gate"].requires_grad_()}, **options(case), return_state=True)
    with torch.no_grad():
        polynomial_update(state=state.detach(), **frame, **options(case))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_states_made_of_another_do_not_change_with_it(device):
    case = Case("product", 2, width=8)
    frame = on(device, frame_of(case, 5, None, False))
    state = State.empty(2, 16, device=device)
    polynomial_update(state=state, **frame, **options(case))
    made = [state.clone(), state + State.empty(2, 16, device=device), state.to(torch.float64)]
    before = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in made]
    polynomial_update(state=state, **frame, **options(case))
    for each, values in zip(made, before, strict=True):
        assert all(torch.equal(tensor, values[name]) for name, tensor in each.state_dict().items())


def test_a_state_of_other_strides_is_updated_after_clone(device):
    case = Case("product", 2, width=8)
    frame = on(device, frame_of(case, 5, None, False))
    total = torch.zeros(16, 1, 2, device=device).permute(2, 1, 0)
    state = State(total, torch.zeros_like(total), torch.zeros(2, 1, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=r"state.total: expected a contiguous.*state.clone\(\)"):
        polynomial_update(state=state, **frame, **options(case))
    fork = state.clone()
    polynomial_update(state=fork, **frame, **options(case))
    assert fork.count.tolist() == [[5], [5]]


@pytest.mark.parametrize(
    "broken, message",
    [
        (lambda s: s.total, "state: expected a State"),
        (lambda s: State.empty(2, 7, device=s.total.device), r"state.total: expected shape \(2, 1, 8\)"),
        (lambda s: State.empty(2, 8, 2, device=s.total.device), r"state.total: expected shape \(2, 1, 8\)"),
        (lambda s: s.to(torch.float64), "state.total: expected float32, got float64"),
        (
            lambda s: State(torch.zeros(2, 1, 16, device=s.total.device)[..., ::2], s.residual, s.count),
            "state.total: expected a contiguous tensor",
        ),
    ],
)
def test_what_is_no_running_state_is_refused(broken, message, device):
    case = Case("power", 2, width=8)
    frame = on(device, frame_of(case, 3, None, False))
    with pytest.raises((TypeError, ValueError), match=message):
        polynomial_update(state=broken(State.empty(2, 8, device=device)), **frame, **options(case))


def test_compiled_update(device):
    torch._dynamo.reset()
    case = Case("product", 2, width=8)
    frame = on(device, frame_of(case, 5, None, False))
    states = [State.empty(2, 16, device=device) for _ in range(2)]

    def step(state):
        return polynomial_update(state=state, **frame, **options(case))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(states[0]), step(states[1]))
    torch.testing.assert_close(states[0].total, states[1].total)
    assert torch.equal(states[0].count, states[1].count)
