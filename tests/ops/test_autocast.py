"""Mixed precision: dtypes under torch.autocast, and what is never rounded there."""

import pytest
import torch

from pom_ext import PoM, State, polynomial_mix, polynomial_update
from pom_ext.models import ImageDiT, VideoDiT

HALF = torch.bfloat16


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("narrow", ("u", "gate"))
def test_the_wider_dtype_is_taken(narrow, causal):
    u, gate, coeff = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.randn(8, 3)
    u, gate = (u.to(HALF), gate) if narrow == "u" else (u, gate.to(HALF))
    options = {"form": "power", "degree": 3, "causal": causal, "return_state": True}
    with pytest.raises(TypeError, match="gate: expected"):
        polynomial_mix(u, gate, coeff, **options)
    with torch.autocast("cpu", HALF):
        y, state = polynomial_mix(u, gate, coeff, **options)
    expected, expected_state = polynomial_mix(u.float(), gate.float(), coeff, **options)
    assert torch.equal(y, expected) and torch.equal(state.total, expected_state.total)


def test_an_update_too():
    u, gate, stream = torch.randn(2, 9, 8).to(HALF), torch.randn(2, 9, 8), State.empty(2, 8)
    with torch.autocast("cpu", HALF):
        y = polynomial_update(u, gate, stream, form="product", degree=2)
    expected, state = polynomial_mix(u.float(), gate, form="product", degree=2, return_state=True)
    assert torch.equal(y, expected) and torch.equal(stream.total, state.total)


@pytest.mark.parametrize("form", ("power", "product"))
def test_sums_and_coefficients_are_not_rounded(form):
    """Projections are; what they give is mixed with float32 coefficients into a float32 state."""
    layer, x = PoM(16, 3, form=form, n_sel_heads=2 if form == "power" else 1), torch.randn(2, 200, 16)
    with torch.autocast("cpu", HALF):
        y, state = layer(x, return_state=True)
        u, gate = layer.context_proj(x), layer.gate_proj(x)
    assert y.dtype == u.dtype == HALF and state.total.dtype == torch.float32
    _, expected = polynomial_mix(
        u.float(), gate.float(), layer.coeff, form=form, degree=3, n_sel_heads=layer.n_sel_heads, return_state=True
    )
    torch.testing.assert_close(state.mean(), expected.mean())


def near(low, high):
    """Within what rounding to bfloat16 at every layer may cost."""
    return (low.float() - high).norm() <= 0.03 * high.norm()


@pytest.mark.parametrize("mixer", ("power", "product"))
def test_models_train(mixer):
    model = ImageDiT(3, 5, 8, patch=2, dim=32, n_layers=2, n_heads=2, mixer=mixer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    images, time, labels = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 700.0]), torch.tensor([1, 4])

    def run():
        y = model(images, time, labels)
        return y, torch.autograd.grad(y.float().square().mean(), model.patch_in.weight)[0]

    with torch.autocast("cpu", HALF):
        y, grad = run()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(images, time, labels)
    expected, expected_grad = run()
    assert near(y, expected) and near(grad, expected_grad) and grad.dtype == torch.float32
    torch.testing.assert_close(compiled, y)


def test_videos_stream():
    model = VideoDiT(3, (8, 8), length=4, n_classes=4, patch=(1, 4, 4), dim=32, n_layers=2, n_heads=4)
    video, time = torch.randn(2, 3, 3, 8, 8), torch.tensor([10.0, 700.0])
    labels = torch.tensor([1, 2])
    expected = model(video, time, labels=labels, frame_causal=True)
    with torch.autocast("cpu", HALF):
        assert near(model(video, time, labels=labels, frame_causal=True), expected) or expected.norm() == 0
