"""CUDA graphs: what is recorded once gives what is called, forward and backward, for whatever its inputs then hold.

On the CPU, where there are no graphs, to record is to remember the call: the tests then are those of their own logic.
"""

import copy
from dataclasses import replace

import pytest
import torch
from cases import FORMS, MODES, Case, draw_inputs, move, run_op
from conftest import DEVICES
from image_cases import image_model, images
from layer_cases import CONTEXTS, DIM, TOKENS, build
from test_determinism import assert_bit_identical
from video_cases import inputs as video_inputs
from video_cases import small as small_video

from pom_ext import State, polynomial_update

needs_gpu = pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU that this library was built for")


def recorded(call, device):
    """What a call returns, tensors by name, and a function that writes into them what it would return now."""
    if device.type == "cpu":
        outputs = {name: t.clone() for name, t in call().items()}
        return outputs, lambda: [outputs[name].copy_(t) for name, t in call().items()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # what is made at the first call must not become part of the graph
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return outputs, graph.replay


def assert_near(results, others):
    """For what holds products of torch, which may choose another algorithm for a graph."""
    torch.testing.assert_close(others, results, rtol=1e-4, atol=1e-4)


def assert_replays(call, change, device, compare=assert_bit_identical):
    """The results of the call, after every `change` of what it reads."""
    outputs, replay = recorded(call, device)
    for _ in range(3):
        change()
        expected = {name: t.clone() for name, t in call().items()}
        replay()
        compare(expected, outputs)


def offsets_on(device, context):
    """Offsets in a list would be copied to the GPU at every call, which no graph can hold."""
    return {
        name: torch.tensor(v, device=device) if isinstance(v, list) else v for name, v in move(context, device).items()
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMS)
def test_operations(form, mode, device):
    prior = mode.split("+")[0] not in ("mask", "cu_seqlens")
    inputs = draw_inputs(Case(form, 3, mode, tokens=130, width=33, axes=2 * (form == "power"), prior=prior))
    fields = ("leaves", "rotaries", "prior_residual", "prior_count", "output_grads")
    inputs = replace(inputs, context=offsets_on(device, inputs.context),
                     **{field: move(getattr(inputs, field), device) for field in fields})  # fmt: skip

    def change():
        for t in (*inputs.leaves.values(), *inputs.output_grads.values(), inputs.prior_residual):
            t.normal_()

    assert_replays(lambda: run_op(inputs, device), change, device)


@pytest.mark.parametrize("tokens", (33, 1100))
@pytest.mark.parametrize("form", FORMS)
def test_updates_of_a_stream(form, tokens, device):
    """One recorded step, replayed for every frame; the state is written in place."""
    u, gate = torch.randn(2, 2, tokens, 12, device=device).unbind()
    coeff = torch.randn(12, 3, device=device) if form == "power" else None
    ours, theirs = (State.empty(2, 12, device=device) for _ in range(2))

    def step(state):
        return {"y": polynomial_update(u, gate, state, coeff, form=form, degree=3)}

    outputs, replay = recorded(lambda: step(ours), device)
    for t in ours.state_dict().values():
        t.zero_()
    for _ in range(4):
        u.normal_()
        replay()
        assert_bit_identical(step(theirs), outputs)
        assert_bit_identical(theirs.state_dict(), ours.state_dict())
    assert ours.count.tolist() == [[4 * tokens]] * 2


def with_gradients(module, *given, **named):
    leaves = dict(module.named_parameters())
    y = module(*given, **named)
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach()} | {name: grad for name, grad in zip(leaves, grads) if grad is not None}


@pytest.mark.parametrize("memory", ("store", "recompute"))
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("name", ("product-default", "power-heads"))
def test_layers(name, context, memory, device):
    layer, x = build(name, device), torch.randn(2, TOKENS, DIM, device=device)
    layer.memory, modes = memory, offsets_on(device, CONTEXTS[context])

    @torch.no_grad()
    def change():
        """New tokens, and weights as after a step of an optimizer."""
        x.normal_()
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)

    assert_replays(lambda: with_gradients(layer, x, **modes), change, device, assert_near)


@pytest.mark.parametrize("mixer", ("power", "product"))
def test_image_models(mixer, device):
    model, given = image_model(mixer=mixer, n_layers=2).to(device), [t.to(device) for t in images()]

    def change():
        given[0].normal_()
        given[2].random_(5)

    assert_replays(lambda: with_gradients(model, *given), change, device, assert_near)


@pytest.mark.parametrize("start", [{}, {"window": 3}], ids=str)
@torch.no_grad()
def test_frame_steps_of_a_video_model(start, device):
    """The past is read from the tensors that it is written back to."""
    model = small_video(mixer=["product", "power"], positions="space").to(device)
    given = move(video_inputs(model, frames=1), device)
    past, own = (model.start(3, **start) for _ in range(2))

    def step(past):
        y, after = model(**given, frame_causal=True, past=past, return_past=True)
        return {"y": y} | {name: t for name, t in after.state_dict().items() if name not in ("seen", "forgetting")}

    def carry(past, outputs):
        for name, t in past.state_dict().items():
            if name in outputs:
                t.copy_(outputs[name])

    outputs, replay = recorded(lambda: step(past), device)
    for _ in range(5):
        given["video"].normal_()
        replay()
        expected = step(own)
        assert_near(expected, outputs)
        carry(past, outputs)
        carry(own, expected)


@needs_gpu
@pytest.mark.parametrize("kind", ("layer", "image model"))
def test_graphed_callables(kind):
    """Forward and backward as torch records them for a training loop."""
    if kind == "layer":
        module, draw = build("power-heads", "cuda"), lambda: [torch.randn(2, TOKENS, DIM, device="cuda")]
    else:
        module = image_model(mixer=["power", "product"], n_layers=2).to("cuda")
        draw = lambda: [torch.randn(2, 3, 8, 8, device="cuda"), *(t.to("cuda") for t in images()[1:])]
    eager = copy.deepcopy(module)
    graphed = torch.cuda.make_graphed_callables(module, tuple(draw()))
    for _ in range(3):
        given = draw()
        results = []
        for each in (graphed, eager):
            each.zero_grad()
            y = each(*given)
            y.square().sum().backward()
            results.append({"y": y.detach().clone()} | {name: p.grad.clone() for name, p in each.named_parameters()})
        assert_near(*results)


@pytest.fixture
def nothing_compiled_before():
    torch._dynamo.reset()


@needs_gpu
def test_reduced_overhead_of_a_model(nothing_compiled_before):
    """torch.compile with CUDA graphs of its own. (That of a layer is in test_compile.)"""
    model, given = image_model(mixer=["power", "product"], n_layers=2).to("cuda"), [t.to("cuda") for t in images()]
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        given[0].normal_()
        found = {name: t.clone() for name, t in with_gradients(compiled, *given).items()}
        assert_near(list(with_gradients(model, *given).values()), list(found.values()))


@needs_gpu
@torch.no_grad()
def test_reduced_overhead_of_a_stream(nothing_compiled_before):
    layer, state, own = build("power-heads", "cuda"), None, None
    compiled = torch.compile(layer, mode="reduce-overhead", fullgraph=True)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(2, TOKENS, DIM, device="cuda")
        y, state = compiled(x, state=state, return_state=True)
        expected, own = layer(x, state=own, return_state=True)
        assert_near(expected, y)
        state = state.clone()  # the next step overwrites it
    assert_near(own.state_dict(), state.state_dict())
