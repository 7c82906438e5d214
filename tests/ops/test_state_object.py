"""`State` itself: adding, forking, moving, saving and loading."""

import copy

import numpy as np
import pytest
import torch
from cases import norm_error
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from pom_ext import State

FIELDS = ("total", "residual", "count")


def draw_state(batch=2, width=5, groups=1, dtype=torch.float32, device="cpu"):
    total = torch.randn(batch, groups, width, dtype=dtype, device=device) * 100
    return State(
        total=total,
        residual=total * torch.finfo(dtype).eps / 4,
        count=torch.randint(1, 9, (batch, groups), device=device).double(),
    )


def value(state):
    """What a state holds, in float64."""
    return state.total.double() + state.residual.double()


def assert_identical(state, other):
    for field in FIELDS:
        torch.testing.assert_close(getattr(state, field), getattr(other, field), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_empty(dtype, device):
    state = State.empty(3, 7, groups=2, dtype=dtype, device=device)
    assert state.total.shape == state.residual.shape == state.mean().shape == (3, 2, 7)
    assert state.total.dtype == state.residual.dtype == dtype and state.total.device.type == device.type
    assert state.count.shape == (3, 2) and state.count.dtype == torch.float64
    for tensor in (state.total, state.residual, state.count, state.mean()):
        assert not tensor.any()


def test_empty_is_the_neutral_element(device):
    state = draw_state(device=device)
    for total in (State.empty(2, 5, device=device) + state, state + State.empty(2, 5, device=device)):
        assert torch.equal(value(total), value(state)) and torch.equal(total.count, state.count)


@pytest.mark.parametrize("groups, other_groups", [(1, 1), (3, 3), (1, 3), (3, 1)])
def test_addition(groups, other_groups, device):
    a, b = draw_state(groups=groups, device=device), draw_state(groups=other_groups, device=device)
    before = a.clone(), b.clone()
    total = a + b
    assert norm_error(value(total), (value(a) + value(b)).cpu()) < 1e-13  # far below float32: addition is exact
    assert torch.equal(total.count, a.count + b.count) and total.total.dtype == torch.float32
    assert_identical(a.merge(b), total)
    assert_identical(a, before[0])
    assert_identical(b, before[1])


@given(
    scales=st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=30), order=st.randoms(use_true_random=False)
)
def test_order_does_not_matter(device, scales, order):
    states = [
        State(
            total=torch.full((1, 1, 1), scale, device=device),
            residual=torch.zeros(1, 1, 1, device=device),
            count=torch.ones(1, 1, dtype=torch.float64, device=device),
        )
        for scale in scales
    ]
    order.shuffle(states)
    while len(states) > 1:
        states.append(states.pop(order.randrange(len(states))) + states.pop(order.randrange(len(states))))
    exact, magnitude = sum(np.float64(scales)), sum(abs(np.float64(scales)))
    assert abs(value(states[0]).item() - exact) <= 1e-12 * magnitude
    assert states[0].count.item() == len(scales)


def test_100_000_merges_stay_accurate():
    """A stream that float32 alone gets wrong: DESIGN asks for 1e-6, unbounded."""
    step = State(total=torch.full((1, 1, 1), 0.1), residual=torch.zeros(1, 1, 1), count=torch.ones(1, 1).double())
    state, naive, exact = State.empty(1, 1), np.float32(0), np.float64(np.float32(0.1))
    for _ in range(100_000):
        state = state + step
        naive += np.float32(0.1)
    assert abs(naive / 1e5 / exact - 1) > 1e-6
    assert abs(value(state).item() / 1e5 / exact - 1) < 1e-12
    assert abs(state.mean().item() / exact - 1) < 1e-7
    assert state.count.item() == 100_000


def test_merged_large_and_small():
    """2^24 + 1 + 1 is 2^24 in float32."""
    one = torch.ones(1, 1, 1)
    count = torch.ones(1, 1).double()
    state = State(total=one * 2**24, residual=one * 0, count=count)
    for _ in range(3):
        state = state + State(total=one, residual=one * 0, count=count)
    assert value(state).item() == 2**24 + 3


def test_mean(device):
    state = draw_state(groups=3, device=device)
    state.count[0, 1] = 0
    expected = value(state) / state.count[..., None]
    expected[0, 1] = 0
    assert state.mean().dtype == torch.float32
    torch.testing.assert_close(state.mean().double(), expected, rtol=2e-7, atol=0)


# States that fade


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 6])
def test_what_is_earlier_fades(parts, per_group, device):
    """total and count of each part of the channels, by the formula, and the mean of what is left."""
    earlier, later = (draw_state(width=6, groups=2, device=device) for _ in range(2))
    fade = torch.rand((2, 2, parts) if per_group else (parts,), device=device)
    after, left = earlier.then(later, fade), fade.double()
    wide = left.repeat_interleave(6 // parts, dim=-1)
    torch.testing.assert_close(value(after), wide * value(earlier) + value(later), rtol=1e-13, atol=1e-11)
    count = left * earlier.count[..., None] + later.count[..., None]
    torch.testing.assert_close(after.count, count, rtol=1e-15, atol=0)
    mean = value(after) / count.repeat_interleave(6 // parts, dim=-1)
    torch.testing.assert_close(after.mean().double(), mean, rtol=1e-6, atol=1e-6)
    assert after.fades and not earlier.fades and after.total.dtype == torch.float32


def test_every_way_of_putting_states_that_fade_together():
    """(a then b) then c is a then (b then c), of which a has faded twice."""
    a, b, c = (draw_state(width=6, dtype=torch.float64) for _ in range(3))
    first, second = torch.rand(2, 2, 1, 3, dtype=torch.float64)
    one = a.then(b, first).then(c, second)
    other = a.then(b.then(c, second), first * second)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-14, atol=1e-12)
    assert not torch.isclose(one.total, b.then(a, first).then(c, second).total).all()
    whole = a.then(b, torch.ones(1, dtype=torch.float64))
    torch.testing.assert_close(value(whole), value(a + b), rtol=1e-14, atol=1e-12)
    assert torch.equal(whole.count[..., 0], (a + b).count)


def test_states_that_fade_do_not_add():
    fading, other = draw_state(width=6).fading(3), draw_state(width=6)
    for call in (lambda: fading + other, lambda: other.merge(fading), lambda: fading + fading):
        with pytest.raises(ValueError, match=r"other: a state that fades does not add, .* earlier.then\(later, fade\)"):
            call()


@pytest.mark.parametrize(
    "later, fade, error, message",
    [
        (lambda: None, torch.ones(1), TypeError, "later: expected a State, got NoneType"),
        (lambda: draw_state(width=6), 0.5, TypeError, "fade: expected a tensor, got float"),
        (
            lambda: draw_state(width=6),
            torch.tensor(0.5),
            ValueError,
            r"fade: expected a factor for each .* got shape \(\)",
        ),
        (lambda: draw_state(width=6), torch.ones(4), ValueError, r"R equal parts of 6 channels, .* got shape \(4,\)"),
        (
            lambda: draw_state(width=6).fading(2),
            torch.ones(3),
            ValueError,
            r"as the states have them, got shape \(3,\)",
        ),
        (lambda: draw_state(width=9), torch.ones(3), ValueError, "later: states of shape .* do not add"),
        (lambda: draw_state(3, width=6), torch.ones(3), ValueError, "later: states of shape .* do not add"),
        (
            lambda: draw_state(width=6, dtype=torch.float64),
            torch.ones(3),
            ValueError,
            "later: expected a state in .*32",
        ),
    ],
)
def test_what_cannot_follow(later, fade, error, message):
    with pytest.raises(error, match=message):
        draw_state(width=6).then(later(), fade)


def test_gradients_of_what_fades():
    def run(earlier, later, fade):
        states = (State(t, torch.zeros_like(t), 3 + t[..., 0]) for t in (earlier, later))
        after = next(states).then(next(states), fade)
        return after.total, after.count, after.mean()

    leaves = (torch.rand(2, 1, 4), torch.rand(2, 1, 4), torch.rand(2, 1, 2))
    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in leaves])


def test_states_that_fade_are_copied_saved_and_loaded(tmp_path, device):
    state = draw_state(width=6, device=device).then(draw_state(width=6, device=device), torch.rand(3, device=device))
    state.save(tmp_path / "state")
    assert_identical(State.load(tmp_path / "state").to(device), state)
    assert_identical(State.from_state_dict(state.clone().state_dict()), state)
    assert_identical(state.to(torch.float64).to(torch.float32), state)
    for counts in (torch.zeros(2, 1, 4), torch.zeros(2, 1, 0), torch.zeros(2, 3, 3), torch.zeros(2, 1, 3, 1)):
        with pytest.raises(ValueError, match=r"or \(B, G, R\) with R a divisor of C"):
            State.from_state_dict(state.state_dict() | {"count": counts})


def test_groups_are_split_and_summed():
    state = draw_state(width=6, groups=6)
    parts = state.split([1, 2, 3])
    assert [part.total.shape[1] for part in parts] == [1, 2, 3]
    assert_identical(State.cat(parts, dim=1), state)
    sums = state.sum_groups(3)
    torch.testing.assert_close(value(sums), value(state).unflatten(1, (2, 3)).sum(2), rtol=1e-13, atol=1e-11)
    assert torch.equal(sums.count, state.count.unflatten(1, (2, 3)).sum(2)) and sums.total.dtype == torch.float32


# Copies


def test_gradients_reach_both_parts_of_a_sum(device):
    a, b = draw_state(device=device), draw_state(groups=3, device=device)
    a.total.requires_grad_(), b.total.requires_grad_()
    (a + b).mean().sum().backward()
    scale = (1 / (a.count + b.count)).float()[..., None].expand(-1, -1, 5)
    torch.testing.assert_close(b.total.grad, scale)
    torch.testing.assert_close(a.total.grad, scale.sum(1, keepdim=True))
    assert not (a + b).detach().total.requires_grad


def test_clone_is_independent(device):
    state = draw_state(device=device)
    fork, before = state.clone(), state.clone()
    for field in FIELDS:
        getattr(fork, field).add_(1)
    assert_identical(state, before)
    assert_identical(copy.deepcopy(state), before)


def test_forks_go_their_own_ways(device):
    state, left, right = (draw_state(device=device) for _ in range(3))
    before, fork = state.clone(), state.clone()
    state = state + left
    fork = fork + right
    assert_identical(state, before + left)
    assert_identical(fork, before + right)


def test_to(device):
    state = draw_state(device="cpu")
    moved = state.to(device)
    assert moved.total.device.type == moved.residual.device.type == moved.count.device.type == device.type
    assert_identical(moved.to("cpu"), state)
    wide = state.to(torch.float64)
    assert wide.total.dtype == wide.residual.dtype == wide.count.dtype == torch.float64
    assert torch.equal(value(wide), value(state))
    assert state.to(torch.float64).to(torch.float32).count.dtype == torch.float64


def test_a_ticket_is_no_part_of_a_state(device):
    """What a GPU's update needs beside the state: made once, zero, neither copied nor saved with it."""
    state = draw_state(device=device)
    counter = state.arrival_counter
    assert counter.dtype == torch.int32 and counter.tolist() == [0, 0] and counter.device == state.total.device
    assert state.arrival_counter is counter
    made = (state.clone(), state.detach(), state.to("cpu"), state.to(torch.float64), state.last(), state + state)
    assert all(each.arrival_counter is not counter for each in made)
    assert set(state.state_dict()) == set(FIELDS) and "arrival_counter" not in repr(state)


def test_clone_is_contiguous(device):
    """Whatever the strides, so that it can be updated in place."""
    state = draw_state(groups=3, device=device)
    assert all(tensor.is_contiguous() for tensor in state.last().clone().state_dict().values())
    turned = State(state.total.mT, state.residual.mT, state.count)
    assert not turned.total.is_contiguous() and turned.clone().total.is_contiguous()
    assert_identical(turned.clone(), turned)


def test_a_change_of_dtype_shares_nothing(device):
    state = draw_state(device=device)
    wide = state.to(torch.float64)
    before = wide.clone()
    for field in FIELDS:
        getattr(state, field).add_(1)
    assert_identical(wide, before)


def test_last(device):
    state = draw_state(groups=3, device=device)
    assert state.last().total.shape == (2, 1, 5)
    assert torch.equal(value(state.last()), value(state)[:, -1:]) and torch.equal(
        state.last().count, state.count[:, -1:]
    )


def test_state_dict_round_trip(device):
    state = draw_state(groups=2, device=device)
    saved = state.state_dict()
    assert all(isinstance(tensor, torch.Tensor) for tensor in saved.values())
    assert_identical(State.from_state_dict(saved), state)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("groups", (1, 3))
def test_save_and_load(groups, dtype, tmp_path, device):
    state = draw_state(groups=groups, dtype=dtype, device=device)
    state.save(tmp_path / "state.safetensors")
    loaded = State.load(tmp_path / "state.safetensors")
    assert_identical(loaded.to(device), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_save_of_a_view(tmp_path, device):
    """The last frame of many, not contiguous in memory, and one that requires grad."""
    state = draw_state(groups=3, device=device).last()
    state.total.requires_grad_()
    state.save(str(tmp_path / "state.safetensors"))
    assert_identical(State.load(str(tmp_path / "state.safetensors")).to(device), state.detach())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, old = tmp_path / "state.safetensors", draw_state()
    old.save(path)

    def no_space(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        draw_state().save(path)
    assert_identical(State.load(path), old)


def damaged(name, path):
    """Write a file that is no complete state."""
    draw_state().save(path)
    content = path.read_bytes()
    if name == "truncated":
        path.write_bytes(content[:-5])
    elif name == "cut in the header":
        path.write_bytes(content[:20])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "a pickle":
        torch.save({"total": torch.ones(1)}, path)
    elif name == "another model":
        save_file({"weight": torch.ones(3)}, path)
    elif name == "wrong shapes":
        save_file(
            {"total": torch.ones(2, 1, 5), "residual": torch.ones(2, 1, 4), "count": torch.ones(2, 1).double()}, path
        )


@pytest.mark.parametrize(
    "name", ("truncated", "cut in the header", "empty", "a pickle", "another model", "wrong shapes")
)
def test_a_damaged_file_is_named(name, tmp_path):
    path = tmp_path / "broken.safetensors"
    damaged(name, path)
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        State.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        State.load(tmp_path / "absent.safetensors")
