"""Objectives, noise shift, guidance and samplers, against formulas with known solutions."""

import math
from unittest.mock import patch

import pytest
import torch
from torch import nn

from pom_ext._random import seeded_generator
from pom_ext.diffusion import (
    OBJECTIVES,
    FlowMatching,
    MeanFlow,
    NoisePrediction,
    build_objective,
    register_objective,
)
from pom_ext.diffusion.guidance import drop_labels, guided_prediction
from pom_ext.diffusion.losses import diffusion_loss
from pom_ext.diffusion.solvers import integrate
from pom_ext.diffusion.timesteps import flow_times, resolution_shift, shift_time
from pom_ext.sampling import sample


class Recorder(nn.Module):
    """A model that answers answer(images, time, labels) and remembers what it was asked."""

    def __init__(self, answer, n_classes=3):
        super().__init__()
        self.config = {"n_classes": n_classes}
        self.answer, self.calls = answer, []
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, images, time, labels):
        self.calls.append((images, time, labels))
        return self.answer(images, time, labels)


def by_label(images, time, labels):
    return labels.to(images.dtype).view(-1, 1, 1, 1).expand_as(images)


def test_noise_shift_is_the_square_root_of_the_pixel_ratio():
    assert resolution_shift(32 * 32) == 1
    assert resolution_shift(128 * 128) == 4
    assert resolution_shift(64 * 64, base_pixels=128 * 128) == 0.5


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_shifted_time_keeps_the_ends_and_multiplies_the_noise_to_signal_ratio(shift):
    time = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(time, shift)
    assert shifted[0] == 0 and shifted[-1] == 1
    inner, inner_shifted = time[1:-1], shifted[1:-1]
    torch.testing.assert_close(inner_shifted / (1 - inner_shifted), shift * inner / (1 - inner))


def test_flow_path_runs_from_image_to_noise_along_its_target():
    flow = FlowMatching()
    image, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(flow.add_noise(image, noise, torch.zeros(3)), image)
    torch.testing.assert_close(flow.add_noise(image, noise, torch.full((3,), 1000.0)), noise)
    time = torch.tensor([100.0, 500.0, 900.0])
    slope = (flow.add_noise(image, noise, time + 50) - flow.add_noise(image, noise, time - 50)) / 0.1
    torch.testing.assert_close(slope, flow.target(image, noise), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 4.0])
def test_noise_prediction_keeps_variance_and_shifts_the_noise_to_signal_ratio(shift):
    def ratio(objective):
        one, zero, time = torch.ones(1000, 1), torch.zeros(1000, 1), torch.arange(1000)
        signal, noise = objective.add_noise(one, zero, time), objective.add_noise(zero, one, time)
        torch.testing.assert_close(signal**2 + noise**2, one)
        return noise / signal

    ratios = ratio(NoisePrediction(shift)) / ratio(NoisePrediction())
    torch.testing.assert_close(ratios, torch.full_like(ratios, shift), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_times_cover_the_range_of_the_network(name):
    time = build_objective(name).draw_time(512, seeded_generator(0)).double()
    assert time.shape == (512,) and 0 <= time.min() < 50 and 940 < time.max() < 1000
    assert abs(time.mean() - 500) < 2
    shifted = FlowMatching(4.0).draw_time(512, seeded_generator(0)) / 1000
    torch.testing.assert_close(shifted, shift_time(FlowMatching().draw_time(512, seeded_generator(0)) / 1000, 4.0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_is_zero_for_the_network_that_knows_the_image(name):
    objective = build_objective(name)
    image = torch.rand(8, 1, 4, 4) * 2 - 1

    def oracle(noisy, time, labels):
        if name != "noise":
            return (noisy - image) / (time / 1000).view(-1, 1, 1, 1)
        signal = objective.scheduler.alphas_cumprod[time.long()].view(-1, 1, 1, 1)
        return (noisy - signal.sqrt() * image) / (1 - signal).sqrt()

    labels = torch.zeros(8, dtype=torch.long)
    assert diffusion_loss(Recorder(oracle), objective, image, labels, seeded_generator(1)) < 1e-6
    time = torch.linspace(100, 900, 8)
    noisy = objective.add_noise(image, torch.randn(image.shape, generator=seeded_generator(2)), time)
    torch.testing.assert_close(objective.estimate(noisy, oracle(noisy, time, labels), time), image, atol=1e-4, rtol=0)
    zero = diffusion_loss(Recorder(lambda noisy, *_: 0 * noisy), objective, image, labels, seeded_generator(1))
    assert zero > 0.5


def test_guidance_moves_away_from_the_unlabelled_prediction_in_one_call():
    model = Recorder(by_label)
    images, time, labels = torch.zeros(2, 1, 2, 2), torch.full((2,), 500.0), torch.tensor([0, 1])
    guided = guided_prediction(model, images, time, labels, 2.5)
    assert len(model.calls) == 1
    assert guided[:, 0, 0, 0].tolist() == [3 + 2.5 * (0 - 3), 3 + 2.5 * (1 - 3)]
    plain = guided_prediction(model, images, time, labels, 1)
    assert len(model.calls[1][0]) == 2, "guidance 1 needs no unlabelled half"
    assert plain[:, 0, 0, 0].tolist() == [0, 1]
    assert guided_prediction(model, images, time, labels, 0)[:, 0, 0, 0].tolist() == [3, 3]


def test_labels_are_dropped_at_the_asked_rate():
    labels = torch.arange(5).repeat(2000)
    dropped = drop_labels(labels, 9, 0.1, seeded_generator(0))
    share = (dropped == 9).double().mean().item()
    assert abs(share - 0.1) < 0.01
    assert torch.equal(dropped[dropped != 9], labels[dropped != 9])
    assert torch.equal(drop_labels(labels, 9, 0.0, seeded_generator(0)), labels)


def test_euler_and_heun_follow_a_linear_field_exactly_as_their_polynomials_say():
    """dx/dt = a x: one Euler step multiplies by 1 + a h, one Heun step by 1 + a h + (a h)^2 / 2."""
    x, slope, steps = torch.ones(2, 3, dtype=torch.float64), 1.7, 5
    h = -1 / steps
    euler = integrate(lambda x, t: slope * x, x, flow_times(steps), "euler")
    heun = integrate(lambda x, t: slope * x, x, flow_times(steps), "heun")
    torch.testing.assert_close(euler, x * (1 + slope * h) ** steps, rtol=1e-12, atol=0)
    torch.testing.assert_close(heun, x * (1 + slope * h + (slope * h) ** 2 / 2) ** steps, rtol=1e-12, atol=0)


def test_solvers_converge_at_their_order():
    def error(solver, steps):
        x = integrate(lambda x, t: -x + math.cos(t), torch.ones(1, dtype=torch.float64), flow_times(steps), solver)
        exact = (1 - (math.cos(1) + math.sin(1)) / 2) * math.exp(1) + 0.5
        return abs(x.item() - exact)

    assert error("euler", 40) / error("euler", 80) == pytest.approx(2, rel=0.1)
    assert error("heun", 40) / error("heun", 80) == pytest.approx(4, rel=0.1)


def test_euler_agrees_with_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    def velocity(x, t):
        return torch.sin(3 * x) + t

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    x = start = torch.randn(4, 1, 3, 3, generator=seeded_generator(0))
    for time in scheduler.timesteps:
        x = scheduler.step(velocity(x, time / 1000), time, x).prev_sample
    torch.testing.assert_close(integrate(velocity, start, flow_times(7, 3.0)), x)


@pytest.mark.parametrize("name", ("flow", "noise"))
def test_a_network_that_knows_the_image_draws_it(name):
    objective = build_objective(name)
    image = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)

    def oracle(noisy, time, labels):
        if name == "flow":
            return (noisy - image) / (time / 1000).view(-1, 1, 1, 1)
        signal = objective.scheduler.alphas_cumprod[time.long()].view(-1, 1, 1, 1)
        return (noisy - signal.sqrt() * image) / (1 - signal).sqrt()

    labels = torch.tensor([0, 1])
    drawn = sample(Recorder(oracle), labels, shape=(1, 4, 4), objective=objective, steps=10, guidance=1)
    torch.testing.assert_close(drawn, image.expand(2, -1, -1, -1), atol=1e-4, rtol=0)


def test_a_sample_depends_on_its_seed_and_index_alone():
    def draw(labels, **options):
        model = Recorder(lambda x, time, labels: torch.tanh(x) + labels.view(-1, 1, 1, 1) * 0.1)
        return sample(model, labels, shape=(2, 4, 4), steps=3, **options)

    labels = torch.tensor([0, 1, 2, 0, 1])
    whole = draw(labels, seed=4)
    assert torch.equal(whole, draw(labels, seed=4))
    torch.testing.assert_close(draw(labels, seed=4, batch_size=2), whole)
    torch.testing.assert_close(draw(labels[:3], seed=4), whole[:3])
    assert not torch.equal(whole[0], whole[3]), "samples of one label differ"
    assert not torch.equal(draw(labels, seed=5), whole)
    assert draw(labels[:0]).shape == (0, 2, 4, 4)


def test_samplers_visit_model_times_from_noise_to_image():
    model = Recorder(lambda x, time, labels: x)
    sample(model, torch.tensor([0]), shape=(1, 2, 2), steps=4, guidance=1, objective=FlowMatching(3.0))
    visited = [call[1].item() for call in model.calls]
    assert visited == pytest.approx([1000 * shift_time(t, 3.0) for t in (1.0, 0.75, 0.5, 0.25)])
    model = Recorder(lambda x, time, labels: x)
    sample(model, torch.tensor([0]), shape=(1, 2, 2), steps=4, guidance=1, objective=NoisePrediction())
    assert [call[1].item() for call in model.calls] == [999, 749, 499, 249]


@pytest.mark.parametrize(
    "options, named",
    [
        ({"labels": torch.tensor([4])}, "labels: expected 0 to 3"),
        ({"labels": torch.tensor([[0]])}, "labels: expected integers"),
        ({"labels": torch.tensor([0.5])}, "labels: expected integers"),
        ({"shape": (4, 4)}, "shape"),
        ({"steps": 0}, "steps"),
        ({"guidance": -1.0}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"solver": "rk4"}, "solver: expected one of"),
        ({"solver": "heun", "objective": NoisePrediction()}, "solver: 'heun' is for flow matching"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_drawn(options, named):
    model = Recorder(by_label)
    with pytest.raises(ValueError, match=named):
        sample(model, **{"labels": torch.tensor([0]), "shape": (1, 4, 4), **options})
    assert not model.calls


def test_bad_objectives_are_named():
    with pytest.raises(ValueError, match="objective: expected one of .*'score'"):
        build_objective("score")
    for name in OBJECTIVES:
        with pytest.raises(ValueError, match="shift"):
            build_objective(name, 0.0)


class Opposite(FlowMatching):
    """A network that predicts the way back, x - noise."""

    def target(self, clean, noise):
        return clean - noise

    def denoise(self, predict, noise, steps, solver="euler"):
        return super().denoise(lambda x, time: -predict(x, time), noise, steps, solver)


def test_a_registered_objective_is_known_by_its_name():
    with pytest.raises(ValueError, match="objective: Opposite has no name to save"):
        Opposite().describe()
    with patch.dict(OBJECTIVES):
        assert register_objective("opposite", "the opposite of flow matching")(Opposite) is Opposite
        objective = build_objective("opposite", 2.0)
        assert type(objective) is Opposite and objective.describe() == {"objective": "opposite", "shift": 2.0}
        image = torch.linspace(-0.9, 0.9, 16).view(1, 1, 4, 4)
        oracle = Recorder(lambda noisy, time, labels: (image - noisy) / (time / 1000).view(-1, 1, 1, 1))
        assert objective.loss(oracle, image.expand(8, -1, -1, -1), torch.zeros(8).long(), seeded_generator(0)) < 1e-6
        drawn = sample(oracle, torch.tensor([0]), shape=(1, 4, 4), objective=objective, steps=3, guidance=1)
        torch.testing.assert_close(drawn, image, atol=1e-4, rtol=0)
        with pytest.raises(ValueError, match="'heun' is for flow matching and the opposite of flow matching; use"):
            sample(oracle, torch.tensor([0]), shape=(1, 4, 4), objective=NoisePrediction(), solver="heun")
        with pytest.raises(ValueError, match="objective: the name 'opposite' is taken by Opposite"):
            register_objective("opposite")(Opposite)
    with pytest.raises(TypeError, match="objective: expected a subclass of Objective, got .*Linear"):
        register_objective("other")(nn.Linear)


def test_what_objectives_do_not_support_is_said():
    assert FlowMatching().supports(solver="heun", guidance=3.0, video=True) == []
    assert NoisePrediction().supports(solver="heun") == [
        "solver: 'heun' is for flow matching; use 'euler' with noise prediction and MeanFlow"
    ]
    assert len(MeanFlow().supports(Recorder(by_label), solver="heun", guidance=3.0, video=True)) == 3


def test_shifts_follow_the_resolution_but_for_noise_prediction():
    assert FlowMatching(2.0).for_resolution(64, 16).shift == 4.0
    assert MeanFlow(2.0, 3.0).for_resolution(64, 16).guidance == 3.0
    noise = NoisePrediction(2.0)
    assert noise.for_resolution(64, 16) is noise


@pytest.mark.parametrize(
    "register, error, message",
    [
        (lambda: register_objective(FlowMatching), TypeError, "name: expected text"),
        (lambda: register_objective("another")(dict), TypeError, "subclass of Objective"),
        (lambda: register_objective("flow")(type("Other", (FlowMatching,), {})), ValueError, "'flow' is taken by"),
        (lambda: register_objective("another")(FlowMatching), ValueError, "has the name 'flow' already"),
    ],
)
def test_registrations_that_are_refused(register, error, message):
    known = dict(OBJECTIVES)
    with pytest.raises(error, match=message):
        register()
    assert known == OBJECTIVES
