"""The mixer across frames with read="split": fades, sinks, blocks, windows and decay, against the formulas."""

from itertools import product

import pytest
import torch
from cases import norm_error
from split_cases import frame_definition

from pom_ext import State
from pom_ext.layers.attention import Attention
from pom_ext.layers.blocks import make_frame_mixer
from pom_ext.layers.frame_mixer import FrameMixer
from pom_ext.layers.layout import ContextWindow, FrameLayout, Grid, swap_blocks

GRID, FRAMES, DIM = Grid(2, 4), 5, 12
KINDS = {
    "product": {"form": "product"},
    "power": {"form": "power", "degree": 3, "n_sel_heads": 6},
    "channels": {"form": "power"},
    "rotary": {"form": "power", "n_sel_heads": 6, "rope": "3d"},
}
MEMORIES = [
    (fade, sink, groups, window, decay)
    for fade, sink, groups, (window, decay) in product(
        (None, "head", "gated"), (0, 1, 3), (1, 2), ((0, 1.0), (1, 1.0), (3, 1.0), (0, 0.7))
    )
    if not (fade and window)
]


def build(kind, **memory):
    mixer = FrameMixer(DIM, **KINDS[kind], read="split", **memory).double()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if "gate" in name or "fade" in name:
                parameter += 0.5 * torch.randn_like(parameter)
    return mixer


def layout_of(window=0, decay=1.0, first=0, frames=FRAMES, **options):
    coordinates = GRID.coordinates(first, frames, "cpu")
    return FrameLayout(
        GRID, causal=True, context_window=ContextWindow(window, decay), coordinates=coordinates, **options
    )


@pytest.mark.parametrize("fade, sink, groups, window, decay", MEMORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_frames_read_what_the_formulas_say(kind, fade, sink, groups, window, decay):
    """Values and all gradients, of all frames at once and of chunks with a cache."""
    mixer = build(kind, fade=fade, sink=sink, space_groups=groups)
    x = torch.randn(2, FRAMES, GRID.height * GRID.width, DIM, dtype=torch.float64, requires_grad=True)
    coordinates = layout_of().coordinates if mixer.rope else None
    expected = frame_definition(mixer, x, GRID.height, GRID.width, window, decay, coordinates)
    seed, inputs = torch.randn_like(expected), [x, *mixer.parameters()]
    exact = torch.autograd.grad(expected, inputs, seed, allow_unused=True)
    caches = []
    for chunks in ((5,), (1,) * 5, (2, 3)):
        cache = mixer.new_cache(2, 0, layout_of(window, decay), torch.float64, "cpu")
        outs, first = [], 0
        for part in x.split(chunks, dim=1):
            out, cache = mixer(part, layout_of(window, decay, first, part.shape[1]), cache)
            outs.append(out)
            first += part.shape[1]
        out = torch.cat(outs, dim=1)
        assert norm_error(out.detach(), expected.detach()) < 1e-12
        for (name, _), a, b in zip(
            [("x", x), *mixer.named_parameters()],
            torch.autograd.grad(out, inputs, seed, allow_unused=True),
            exact,
            strict=True,
        ):
            assert (a is None and (b is None or not b.any())) or norm_error(a, b) < 1e-11, name
        caches.append(cache.detach())
    for cache in caches[1:]:
        torch.testing.assert_close(cache.state_dict(), caches[0].state_dict(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fade, sink, groups, window, decay", MEMORIES[::5])
def test_noisy_frames_read_the_clean_ones_before_them(fade, sink, groups, window, decay):
    """The noisy half of the batch, frame by frame: the clean frames before it, then the noisy one, by the formulas."""
    mixer = build("power", fade=fade, sink=sink, space_groups=groups)
    clean, noisy = torch.randn(2, 2, FRAMES, GRID.height * GRID.width, DIM, dtype=torch.float64)
    out, cache = mixer(torch.cat([clean, noisy]), layout_of(window, decay, teacher_forced=True))
    for f in range(FRAMES):
        mixed = torch.cat([clean[:, :f], noisy[:, f : f + 1]], dim=1)
        expected = frame_definition(mixer, mixed, GRID.height, GRID.width, window, decay)[:, f]
        assert norm_error(out[2:, f].detach(), expected.detach()) < 1e-12
    expected, after = mixer(clean, layout_of(window, decay))
    torch.testing.assert_close(out[:2], expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(cache.state_dict(), after.state_dict(), rtol=1e-12, atol=1e-13)


def test_the_cache_has_a_constant_size():
    mixer = build("power", fade="head", sink=2, space_groups=2)
    cache = mixer.new_cache(1, 0, layout_of(), torch.float64, "cpu")
    assert cache.total.shape == (1, 1 + 1 + 2, mixer.state_width) and cache.count.shape == (1, 4, 6)
    x = torch.randn(1, 4, 8, DIM, dtype=torch.float64)
    after = mixer(x, layout_of(frames=4), cache)[1]
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in after.state_dict().values())
    assert {n: t.shape for n, t in after.state_dict().items()} == {n: t.shape for n, t in cache.state_dict().items()}
    assert torch.equal(after.count[0, 1], torch.full((6,), 16.0, dtype=torch.float64))  # two frames of eight tokens
    windowed = build("power", sink=1, space_groups=2).new_cache(1, 0, layout_of(window=4), torch.float64, "cpu")
    assert windowed.total.shape[1] == 3 + 1 + 3 * 2


@torch.no_grad()
def test_a_sink_keeps_its_first_frames_for_ever():
    """After two hundred frames, the sums of the sink are bit for bit those of its frames."""
    mixer = build("power", fade="gated", sink=2)
    x = torch.randn(1, 200, 8, DIM, dtype=torch.float64)
    cache, kept = None, None
    for f in range(200):
        _, cache = mixer(x[:, f : f + 1], layout_of(first=f, frames=1), cache)
        if f == 1:
            kept = cache.map(lambda t: t[:, 1:])
    assert torch.equal(cache.total[:, 1:], kept.total) and torch.equal(cache.count[:, 1:], kept.count)
    assert (cache.count[:, 0] < cache.count[:, 1] * 100).all()


def test_blocks_of_patches():
    grid = Grid(4, 6)
    x = torch.arange(24).view(1, 1, 24, 1)
    blocks = swap_blocks(x, grid, 2)
    assert blocks.flatten()[:8].tolist() == [0, 1, 6, 7, 2, 3, 8, 9]
    assert torch.equal(swap_blocks(blocks, grid, 2, back=True), x)


@pytest.mark.parametrize("kind", ["attention+power", "attention+product"])
@torch.no_grad()
def test_a_hybrid_adds_attention_inside_the_frame(kind):
    hybrid = make_frame_mixer(kind, DIM, 2, read="split", fade="head").double()
    x = torch.randn(2, FRAMES, 8, DIM, dtype=torch.float64)
    out, cache = hybrid(x, layout_of())
    across, same = hybrid.across(x, layout_of())
    assert isinstance(hybrid.inside, Attention) and isinstance(cache, State)
    inside = torch.stack([hybrid.inside(frame, GRID) for frame in x.unbind(1)], dim=1)
    torch.testing.assert_close(out, across + inside, rtol=1e-12, atol=1e-13)
    assert torch.equal(cache.total, same.total)


@pytest.mark.parametrize("memory", [{"sink": 1}, {"space_groups": 2}])
def test_a_shared_read_has_no_gate_for_more(memory):
    ((name, value),) = memory.items()
    with pytest.raises(ValueError, match=f"{name}: expected .* with read='shared', got {value}"):
        FrameMixer(DIM, **memory)
