"""MeanFlow: the identity that its loss rests on, drawing in spans, and training by it with every mixer."""

import pytest
import torch
from test_diffusion import Recorder
from training_cases import CONFIG, Stripes, assert_same_weights, tiny_model

from pom_ext._random import seeded_generator
from pom_ext.diffusion import FlowMatching, MeanFlow
from pom_ext.diffusion.meanflow import WEIGHT_FLOOR, meanflow_loss
from pom_ext.layers.embeddings import MAX_TIME
from pom_ext.models import ImageDiT
from pom_ext.models.checkpoint import load_model
from pom_ext.sampling import sample
from pom_ext.training import train

MEANFLOW = type(CONFIG)(**{**vars(CONFIG), "objective": "meanflow", "guidance": 2.0})
MODEL = {"patch": 2, "dim": 16, "n_layers": 2, "n_heads": 2, "two_times": True}


class Spans(Recorder):
    """A model of two times that answers answer(images, time, labels, span)."""

    def forward(self, images, time, labels, span=None):
        self.calls.append((time, span))
        return self.answer(images, time, labels, torch.zeros_like(time) if span is None else span)


def unit(time):
    return (time / MAX_TIME).view(-1, 1, 1, 1)


def random_model(**options):
    torch.manual_seed(0)
    model = ImageDiT(1, 3, 4, **{**MODEL, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def draw(batch=6):
    images, labels = torch.randn(batch, 1, 4, 4, dtype=torch.float64), torch.arange(batch) % 4
    return images, labels, seeded_generator(1)


def test_times_and_spans():
    objective = MeanFlow(2.0)
    time, span = objective.draw_times(4000, seeded_generator(0))
    assert (span >= 0).all() and (span <= time).all() and (time < MAX_TIME).all()
    assert (span == 0).double().mean().sub(MeanFlow.INSTANT).abs() < 0.03
    of_flow = FlowMatching(2.0).draw_time(4000, seeded_generator(1))
    torch.testing.assert_close(time[span == 0].mean(), of_flow.mean(), rtol=0.03, atol=0)
    assert (time[span > 0] - span[span > 0]).mean() < of_flow.mean() < time[span > 0].mean()


def test_the_mean_velocity_of_one_image_has_no_loss():
    """All paths to one image are straight: u(x, t, any span) = (x - image) / t."""
    image = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    exact = Spans(lambda x, time, labels, span: (x - image) / unit(time))
    labels = torch.zeros(8, dtype=torch.long)
    assert meanflow_loss(exact, MeanFlow(), image.expand(8, -1, -1, -1), labels, seeded_generator(0)) < 1e-20
    wrong = Spans(lambda x, time, labels, span: (x - image) / unit(time) * (1 + unit(span)))
    assert meanflow_loss(wrong, MeanFlow(), image.expand(8, -1, -1, -1), labels, seeded_generator(0)) > 1e-6


@pytest.mark.parametrize("guidance", (1.0, 2.5))
def test_the_loss_by_finite_differences(guidance):
    """Value and gradient, with the derivative of the right side taken by differences and held constant."""
    model, objective, (images, labels, _) = random_model(), MeanFlow(1.5, guidance), draw()
    with torch.no_grad():
        generator = seeded_generator(1)
        time, span = (t.double() for t in objective.draw_times(len(images), generator))
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        x, velocity = objective.add_noise(images, noise, time), noise - images
        free = model(x, time, torch.full_like(labels, 3))
        guided = guidance * velocity + (1 - guidance) * free
        velocity = torch.where((labels == 3).view(-1, 1, 1, 1), velocity, guided)
        step = 1e-5
        ahead, behind = (
            model(x + s * velocity, time + s * MAX_TIME, labels, span + s * MAX_TIME) for s in (step, -step)
        )
        target = velocity - unit(span) * (ahead - behind) / (2 * step)
    error = (model(x, time, labels, span) - target).square().mean((1, 2, 3))
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    expected = (weight * error).sum() / weight.sum()
    loss = meanflow_loss(model, objective, images, labels, seeded_generator(1))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    grads, expected = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mixer", ("power", "product", "attention", "local"))
def test_every_mixer_has_the_loss(mixer):
    model = random_model(mixer=mixer, n_registers=2)
    meanflow_loss(model, MeanFlow(1.0, 2.0), *draw()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.span_embed.mlp[-1].weight.grad.norm() > 0


@pytest.mark.parametrize("steps", (1, 3))
def test_drawing_is_exact_in_any_number_of_steps(steps):
    images = torch.randn(2, 1, 4, 4)
    exact = Spans(lambda x, time, labels, span: (x - images[labels]) / unit(time))
    drawn = sample(exact, torch.tensor([0, 1, 0]), shape=(1, 4, 4), objective=MeanFlow(2.0), steps=steps)
    torch.testing.assert_close(drawn, images[[0, 1, 0]], rtol=1e-5, atol=1e-5)
    assert len(exact.calls) == steps
    ends = [(time - span)[0].item() for time, span in exact.calls]
    assert ends[-1] == 0 and ends[:-1] == [time[0].item() for time, _ in exact.calls[1:]], "one span follows another"


def test_one_step_is_what_is_drawn_by_default():
    model = Spans(lambda x, time, labels, span: x)
    assert not sample(model, [0, 1], shape=(1, 2, 2), objective=MeanFlow()).any()
    assert len(model.calls) == 1


def test_a_model_of_two_times_starts_as_that_of_one():
    model = random_model()
    torch.nn.init.zeros_(model.span_embed.mlp[-1].weight)
    torch.nn.init.zeros_(model.span_embed.mlp[-1].bias)
    images, labels, _ = draw()
    time = torch.linspace(0, 999, len(images)).double()
    torch.testing.assert_close(model(images, time, labels, time / 2), model(images, time, labels))


def test_training_resumes_and_draws(tmp_path):
    """Across the change from velocities to their means."""
    path, options = tmp_path / "model.safetensors", {"config": MEANFLOW, "steps": 12, "progress": False}
    whole = train(tiny_model(two_times=True), Stripes(), tmp_path / "whole.safetensors", **options)
    stopped = type("Stopped", (Stripes,), {"__getitem__": stop_at(4 * 9)})
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model(two_times=True), stopped(), path, save_every=3, **options)
    resumed = train(tiny_model(two_times=True), Stripes(), path, resume=True, **options)
    assert_same_weights(resumed.model, whole.model)
    assert resumed.losses == whole.losses and all(0 < loss < 10 for loss in whole.losses)
    model, settings = load_model(path)
    assert settings["train"]["guidance"] == 2.0 and model.config["two_times"]
    drawn = sample(model, [0, 1], shape=Stripes.shape, objective=MeanFlow())
    assert drawn.isfinite().all() and drawn.shape == (2, 1, 8, 8)


def stop_at(last):
    left = iter(range(last))

    def get(self, index):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return Stripes.__getitem__(self, index)

    return get


def test_what_does_not_fit_is_named(tmp_path):
    images, labels, _ = draw()
    time = torch.rand(6).double()
    plain = random_model(two_times=False)
    with pytest.raises(ValueError, match="span: expected None, .*two_times=True"):
        plain(images, time, labels, time)
    with pytest.raises(ValueError, match=r"span: expected shape \(6,\)"):
        random_model()(images, time, labels, time[:2])
    for config, model in ((MEANFLOW, tiny_model()), (CONFIG, tiny_model(two_times=True))):
        with pytest.raises(ValueError, match="model: objective='meanflow' needs a model with two_times=True"):
            train(model, Stripes(), tmp_path / "x", config, steps=1)
    with pytest.raises(ValueError, match="guidance: trained in by objective='meanflow' only, got 2.0"):
        type(CONFIG)(guidance=2.0)
    with pytest.raises(ValueError, match="guidance: expected a positive number, got -1"):
        MeanFlow(1.0, -1)
    for options, message in (
        ({"guidance": 3.0}, "guidance: expected 1, for it is trained into a MeanFlow model, got 3.0"),
        ({"solver": "heun"}, "solver: 'heun' is for flow matching"),
    ):
        with pytest.raises(ValueError, match=message):
            sample(random_model().float(), [0], shape=(1, 4, 4), objective=MeanFlow(), **options)
