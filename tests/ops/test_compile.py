"""torch.compile of everything: one graph without a break, for all lengths, with the results of eager; and packages."""

import pytest
import torch
from cases import FORMS, MODES, Case, draw_inputs, move, op_function
from image_cases import image_model, images
from layer_cases import CONTEXTS, DIM, TOKENS, build, positions_of
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim, export
from video_cases import inputs as video_inputs
from video_cases import small as small_video

from pom_ext import PoM, State, polynomial_readout, polynomial_state, polynomial_update
from pom_ext.models import image_dit

AOT_EAGER = {"backend": "aot_eager"}
SIDES = (16, 8, 24, 12, 20, 10, 14, 26, 18, 22)  # ten sizes, 16 to 169 tokens


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch._dynamo.reset()
    counters.clear()


def results(function, module, *given, **named):
    """Outputs, a tensor or a dictionary of them, and the gradients of all parameters."""
    module.zero_grad()
    outputs = function(*given, **named)
    outputs = outputs if isinstance(outputs, dict) else {"y": outputs}
    sum(y.square().sum() for y in outputs.values() if y.requires_grad).backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {name: y.detach() for name, y in outputs.items()} | grads


def assert_same(compiled, function, module, *given, **named):
    found, expected = (results(f, module, *given, **named) for f in (compiled, function))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def assert_one_graph(function, module, *given, how=AOT_EAGER, **named):
    """Compiled without a break into one graph, forward and backward, which gives what eager mode gives, every time."""
    compiled = torch.compile(function, **how)
    for _ in range(3):  # by the third time CUDA graphs are replayed, where there are any
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(compiled, function, module, *given, **named)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_breaks_are_counted():
    def broken(x):
        x = 2 * x
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(AssertionError, match="graph_break"):
        assert_one_graph(broken, torch.nn.Linear(1, 1), torch.ones(1, requires_grad=True))


@pytest.mark.parametrize(
    "name, memory",
    [
        ("product-groups-nobias", "store"),
        ("product-degree4-heads", "recompute"),
        ("power-heads", "store"),
        ("power-1d", "recompute"),
    ],
)
def test_layers_in_every_context(name, memory, device):
    layer, x = build(name, device), torch.randn(2, TOKENS, DIM, device=device)
    layer.memory, positions = memory, positions_of(layer, TOKENS, device)
    contexts = {mode: move(context, device) for mode, context in CONTEXTS.items()}

    def run(x):
        outputs = {mode: layer(x, **context, **positions) for mode, context in contexts.items()}
        if layer.rope is None:
            _, state = layer(x[:, :4], return_state=True)
            outputs |= {"stream": layer(x[:, 4:], state=state), "cross": layer(x[:, :4], x)}
        return outputs

    assert_one_graph(run, layer, x)


def test_compile_to_code(device):
    """By Inductor, and on a GPU with CUDA graphs of its own."""
    layer, how = build("power-heads", device), {"mode": "reduce-overhead"}
    assert_one_graph(layer, layer, torch.randn(2, TOKENS, DIM, device=device), how=how, frames=3)


def test_a_stream(device):
    """The state goes in and out of a compiled step."""
    layer, x = build("power-default", device), torch.randn(4, 2, 6, DIM, device=device)
    compiled, state, compiled_state = torch.compile(layer, fullgraph=True, backend="aot_eager"), None, None
    with torch.no_grad():
        for frame in x:
            y, state = layer(frame, state=state, return_state=True)
            compiled_y, compiled_state = compiled(frame, state=compiled_state, return_state=True)
            torch.testing.assert_close(compiled_y, y)
    torch.testing.assert_close(compiled_state.state_dict(), state.state_dict())


@pytest.mark.parametrize("form", FORMS)
def test_functions_in_every_mode(form, device):
    cases = [draw_inputs(Case(form, 3, mode, axes=2 * (form == "power"))) for mode in MODES]
    functions, leaves = [op_function(inputs, device) for inputs in cases], torch.nn.Module()
    for i, inputs in enumerate(cases):
        for name, leaf in inputs.leaves.items():
            leaves.register_parameter(f"{name}{i}", torch.nn.Parameter(leaf.to(device)))

    def run():
        outputs = {}
        for i, (inputs, function) in enumerate(zip(cases, functions)):
            given = {name: getattr(leaves, f"{name}{i}") for name in inputs.leaves}
            outputs |= {f"{name}{i}": y for name, y in function(**given).items()}
        u, gate, coeff = given["u"], given["gate"], given.get("coeff")
        options = {"form": form, "degree": 3}
        state = polynomial_state(u, coeff, frames=7, **options)
        outputs["readout"] = polynomial_readout(gate, state + state, form=form)
        with torch.no_grad():
            stream = State.empty(2, u.shape[2], device=device)
            outputs |= {f"update{i}": polynomial_update(u, gate, stream, coeff, **options) for i in range(2)}
        return outputs | stream.state_dict()

    assert_one_graph(run, leaves)


@pytest.mark.parametrize(
    "options",
    [
        {"mixer": ["power", "product", "attention", "local"], "n_layers": 4, "window": 3},
        {"mixer": "product", "n_layers": 1, "n_registers": 2, "two_times": True},
    ],
    ids=str,
)
def test_image_models(options):
    model, (noisy, time, labels) = image_model(**options), images()
    span = {"span": time / 2} if "two_times" in options else {}
    assert_one_graph(model, model, noisy, time, labels, **span)


@pytest.mark.parametrize("mixer, causal", [(["product", "power"], True), (["power"], False), (["attention"], True)])
def test_video_models(mixer, causal):
    model = small_video(mixer=mixer, n_classes=4, text_dim=5)
    assert_one_graph(model, model, **video_inputs(model, per_frame=causal), frame_causal=causal)


@pytest.mark.parametrize("mixer, start", [("product", {}), ("power", {"window": 3})])
def test_frame_steps_of_a_video_model(mixer, start):
    """The past goes in and out. The first frame, and one step for all others."""
    model, counter = small_video(mixer=mixer, n_layers=1, n_classes=4), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    given, pasts = video_inputs(model, per_frame=True), [model.start(3, **start)] * 2
    with torch.no_grad():
        for i in range(6):
            frame = {"video": given["video"][:, :, 2 * i : 2 * i + 2]}
            frame |= {name: given[name][:, i : i + 1] for name in ("time", "labels")}
            options = {**frame, "frame_causal": True, "return_past": True}
            outs, pasts = zip(*(step(past=past, **options) for step, past in zip((model, compiled), pasts)))
            torch.testing.assert_close(*outs)
    torch.testing.assert_close(*(past.state_dict() for past in pasts))
    assert counter.frame_count == 2


def test_ten_sizes_of_the_s2_model_are_compiled_twice():
    """Once for the first size and once for all others. What is compiled anew is decided before the backend sees it."""
    model, counter = image_dit("S/2", n_classes=10), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for side in SIDES:
            compiled(*images(1, side, side, channels=4))
    assert counter.frame_count == 2


def test_ten_sizes_of_an_image_model():
    """The backend too keeps what it made for all sizes, forward and backward."""
    model, counter = image_model(n_layers=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for side in SIDES:
        assert_same(compiled, model, model, *images(2, side, side))
    assert counter.frame_count == 2


@pytest.mark.parametrize("name, dynamic, times", [("power-default", None, 2), ("product-groups-nobias", True, 1)])
def test_ten_lengths_of_a_layer(name, dynamic, times):
    """Compiled once for the first length and once for all others, or once where the caller says so."""
    layer, counter = build(name), CompileCounterWithBackend("aot_eager")

    def run(x, weight, cu_seqlens):
        contexts = {}, {"causal": True}, {"frames": 3, "weight": weight}, {"cu_seqlens": cu_seqlens}
        return {str(i): layer(x, **context) for i, context in enumerate(contexts)}

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=dynamic)
    for tokens in range(6, 36, 3):
        offsets = torch.tensor([0, 2, 2, tokens])
        assert_same(compiled, run, layer, torch.randn(2, tokens, DIM), torch.rand(2, tokens), offsets)
    assert counter.frame_count == times


def sized(*free):
    return dict.fromkeys(free, Dim.AUTO)


MEMORIES = {"video": {}, "split": {"read": "split", "sink": 1, "local_conv": 1}}


@pytest.mark.parametrize("kind", ("registers", *MEMORIES))
def test_exported_models_take_any_size(kind):
    if kind == "registers":
        model = image_model(mixer="product", n_layers=1, n_registers=2)
        names, sizes = ("images", "time", "labels"), ((2, 12, 14), (3, 10, 16))
        given, other = (dict(zip(names, images(*size))) for size in sizes)
        free = {"images": sized(0, 2, 3), "time": sized(0), "labels": sized(0)}
    else:
        model = small_video(mixer=["power"], n_classes=4, text_dim=5, **MEMORIES[kind])
        given, other = (video_inputs(model, *sizes, per_frame=True) for sizes in ((6, 3), (4, 2, (6, 4))))
        given["frame_causal"] = other["frame_causal"] = True
        free = {"video": sized(0, 2, 3, 4), **dict.fromkeys(("time", "labels", "text", "text_weight"), sized(0, 1))}
        free["frame_causal"] = None
    program = export(model.eval(), (), given, dynamic_shapes=free)
    torch.testing.assert_close(program.module()(**other), model(**other), rtol=1e-4, atol=1e-4)


class Both(torch.nn.Module):
    """A layer and an image model, for one package: a compiler takes as long for either."""

    def __init__(self):
        super().__init__()
        self.layer, self.model = PoM(8, 3, form="power", n_sel_heads=4), image_model(n_layers=1, mixer="product")

    def forward(self, x, noisy, time, labels):
        return self.layer(x), self.layer(x, causal=True), self.model(noisy, time, labels)


def test_export_and_package(tmp_path):
    """For any number of tokens and any number and size of images: as a program, and compiled into a file."""
    both = Both().eval()
    with torch.no_grad():
        program = export(
            both,
            (torch.randn(2, 6, 8), *images(2, 8, 12)),
            dynamic_shapes=(sized(0, 1), sized(0, 2, 3), sized(0), sized(0)),
        )
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "both.pt2"))
        packaged = torch._inductor.aoti_load_package(package)
        for tokens, shape in zip(((2, 6), (3, 17), (2, 300)), ((2, 8, 12), (3, 12, 8), (4, 16, 20))):
            given = torch.randn(*tokens, 8), *images(*shape)
            expected = both(*given)
            torch.testing.assert_close(program.module()(*given), expected)
            torch.testing.assert_close(tuple(packaged(*given)), expected, rtol=1e-4, atol=1e-5)
