"""Distillation: the student starts as its teacher, learns the teacher's guided paths, and draws a frame in one step."""

import pytest
import torch
from test_video_training import Bar, Interrupted, InterruptedBar
from test_video_training import run as train_video
from torch import nn
from training_cases import assert_same_weights
from training_cases import run as train_image
from video_cases import FRAMES, inputs, small

from pom_ext._random import seeded_generator
from pom_ext.diffusion import Distillation, FlowMatching, MeanFlow
from pom_ext.diffusion.losses import draw_frames
from pom_ext.diffusion.meanflow import WEIGHT_FLOOR
from pom_ext.layers.embeddings import MAX_TIME
from pom_ext.models.checkpoint import load_model, save_checkpoint
from pom_ext.streaming import VideoStream
from pom_ext.training import TrainConfig, distill, train
from pom_ext.training.distillation import distill_config, load_teacher, make_student


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a video model of two classes, trained with flow matching."""
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    train_video(path, steps=150, context_noise=0.5)
    return path


def run(teacher, path, steps=6, dataset=None, draw_steps=1, resume=False, save_every=1000, **options):
    config = distill_config(load_teacher(teacher)[1], warmup=2, **options)
    more = {"steps": steps, "draw_steps": draw_steps, "resume": resume, "save_every": save_every}
    return distill(teacher, dataset or Bar("classes"), path, config, **more, progress=False)


@pytest.mark.parametrize("frequency", [None, 0.02])
@torch.no_grad()
def test_a_student_starts_as_its_teacher_bit_for_bit(frequency):
    teacher = small(n_classes=4, read="split", fade="gated", sink=1, time_frequency=frequency)
    student, given = make_student(teacher), inputs(teacher, per_frame=True)
    assert student.config["two_times"] and student.reference_parameter.dtype == torch.float64
    for options in ({}, {"frame_causal": True}, {"frame_causal": True, "finished": given["video"].flip(0)}):
        expected = teacher(**given, **options)
        for span in (None, torch.zeros_like(given["time"]), given["time"] / 2):
            assert torch.equal(student(**given, span=span, **options), expected)
    streams = VideoStream(teacher, [0], steps=3), VideoStream(student, [0], steps=3, objective=MeanFlow())
    for _ in range(3):
        torch.testing.assert_close(streams[0].next(), streams[1].next(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("draw_steps", [1, 2])
def test_spans_stay_inside_one_step_of_the_drawing(draw_steps):
    time, span = Distillation(small(), 2.0, draw_steps=draw_steps).draw_times(4000, seeded_generator(0))
    start, between = time - span, 0.0 if draw_steps == 1 else MAX_TIME * 2 / 3  # shift 2 takes 1/2 to 2/3
    assert (span >= 0).all() and (start >= -1e-3).all() and MAX_TIME - 1 < time.max() <= MAX_TIME
    late = time > between
    assert (start[late] >= between - 1e-3).all() and 0.2 < late.double().mean() <= 1
    assert ((start[late] - between).abs() < 1e-3).double().mean() == pytest.approx(Distillation.WHOLE, abs=0.05)


class Straight(nn.Module):
    """Knows the one clip of its data: every path to it is straight."""

    def __init__(self, clip, wrong=0.0):
        super().__init__()
        self.clip, self.wrong, self.config = clip, wrong, {"patch": (1, 1, 1), "n_classes": 0, "length": 5}

    def forward(self, noisy, time, labels=None, span=None, **arguments):
        velocity = (noisy - self.clip) / (time / MAX_TIME).clamp_min(1e-6)[:, None, :, None, None]
        return velocity if span is None else velocity * (1 + self.wrong * span[:, None, :, None, None] / MAX_TIME)


def test_the_mean_velocity_of_straight_paths_has_no_loss():
    clip = torch.randn(1, 2, 5, 3, 3, dtype=torch.float64)
    objective, video = Distillation(Straight(clip)), clip.expand(4, -1, -1, -1, -1)
    assert objective.loss(Straight(clip), video, None, seeded_generator(0)) < 1e-20
    assert objective.loss(Straight(clip, wrong=0.5), video, None, seeded_generator(0)) > 1e-6


@pytest.mark.parametrize(
    "guidance, context, context_noise, given", [(1.0, "clean", 0.0, 0), (2.5, "clean", 0.7, 2), (2.5, "self", 0.5, 0)]
)
def test_the_loss_frame_by_frame(guidance, context, context_noise, given):
    """Value and gradient, with a cache for the student, and two for its guided teacher."""
    options = {"n_classes": 4, "read": "split", "fade": "head", "sink": 1}
    teacher, student = small(**options), small(seed=1, two_times=True, **options)
    objective = Distillation(teacher, 1.5, guidance)
    video, labels = torch.randn(3, 3, 2 * FRAMES, 4, 6, dtype=torch.float64), torch.tensor([1, 4, 2])
    settings = {"context": context, "context_noise": context_noise, "given": given}
    drawn = draw_frames(student, objective, objective.draw_times, video, labels, seeded_generator(1), **settings)
    finished = drawn.arguments["finished"]
    finished_times = drawn.arguments.get("finished_time", torch.zeros(3, FRAMES, dtype=torch.float64))
    no_class, causal = torch.full_like(labels, 4), {"frame_causal": True}
    past, taught, free, errors = None, None, None, []
    for frame in range(FRAMES):
        x, before = (t[:, :, 2 * frame : 2 * frame + 2] for t in (drawn.noisy, finished))
        time, span, finished_time = (t[:, frame] for t in (*drawn.times, finished_times))
        step = span.clamp_max(MAX_TIME / 32)
        with torch.no_grad():
            velocity = teacher(x, time, labels=no_class, past=free, **causal)
            velocity = velocity + guidance * (teacher(x, time, labels=labels, past=taught, **causal) - velocity)
            step_, span_ = (t.view(-1, 1, 1, 1, 1) / MAX_TIME for t in (step, span))
            moved = student(x - step_ * velocity, time - step, None, labels, span - step, past=past, **causal)
            target = torch.where(span_ > 0, (step_ * velocity + (span_ - step_) * moved) / span_, velocity)
        if frame >= given:
            errors.append(
                (student(x, time, None, labels, span, past=past, **causal) - target).square().mean((1, 2, 3, 4))
            )
        keep = {"return_past": True, **causal}
        _, past = student(before, finished_time, labels=labels, past=past, **keep)
        _, taught = teacher(before, finished_time, labels=labels, past=taught, **keep)
        _, free = teacher(before, finished_time, labels=no_class, past=free, **keep)
    error = torch.cat(errors)
    weight = 1 / (error.detach() + WEIGHT_FLOOR)
    expected = (weight * error).sum() / weight.sum()
    loss = objective.loss(student, video, labels, seeded_generator(1), **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert all(p.grad is None for p in teacher.parameters())
    parameters = list(student.parameters())
    grads = (torch.autograd.grad(value, parameters, allow_unused=True) for value in (loss, expected))
    zeros = [torch.zeros_like(p) for p in parameters]
    grads, expected = ([z if g is None else g for g, z in zip(gs, zeros, strict=True)] for gs in grads)
    torch.testing.assert_close(grads, expected, rtol=1e-8, atol=1e-10)


def drawn(model, video, labels, noise, *, steps, span):
    """The frames of clips, each from noise in so many steps behind the true ones before it, without guidance."""

    def predict(x, time, *spans):
        more = {"span": torch.full((len(x),), spans[0])} if span else {}
        times = torch.full((len(x),), float(time))
        return model(x, times, labels=labels, frame_causal=True, finished=video, **more)

    with torch.no_grad():
        return (MeanFlow if span else FlowMatching)().denoise(predict, noise, steps)


def test_a_student_draws_in_one_step_what_its_teacher_draws_in_many(teacher, tmp_path):
    result = run(teacher, tmp_path / "student", steps=200, guidance=1.0, ema_decay=0.95)
    data, model = Bar("classes"), load_teacher(teacher)[0]
    video, labels = torch.stack([data[i][0] for i in range(12)]), torch.stack([data[i][1] for i in range(12)])
    noise = torch.randn(video.shape, generator=seeded_generator(5))
    expected = drawn(model, video, labels, noise, steps=32, span=False)
    at_once = drawn(model, video, labels, noise, steps=1, span=False)
    ours = drawn(result.model, video, labels, noise, steps=1, span=True)
    errors = [(frames - expected).square().mean() for frames in (at_once, ours)]
    assert errors[1] < 0.5 * errors[0]


def test_its_checkpoint_is_that_of_any_mean_velocity(teacher, tmp_path):
    run(teacher, tmp_path / "student", steps=3, draw_steps=2)
    model, settings = load_model(tmp_path / "student")
    taught = load_teacher(teacher)[1]["train"]
    assert settings["architecture"] == "VideoDiT" and settings["distilled"]["draw_steps"] == 2
    assert (settings["train"]["objective"], settings["train"]["guidance"]) == ("meanflow", 2.0)
    for name in ("shift", "context_noise", "lr", "batch_size"):
        assert settings["train"][name] == taught[name], name
    stream = VideoStream(model, [0, 1], objective=MeanFlow(settings["train"]["shift"]), steps=1)
    assert stream.next().isfinite().all()


def test_an_interrupted_distillation_resumes_bit_for_bit(teacher, tmp_path):
    whole = run(teacher, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(teacher, tmp_path / "part", dataset=InterruptedBar("classes", 4 * 4), save_every=3)
    resumed = run(teacher, tmp_path / "part", resume=True)
    assert resumed.losses == whole.losses and all(loss > 0 for loss in whole.losses)
    assert_same_weights(resumed.model, whole.model)
    with pytest.raises(ValueError, match="resume: .*another distilled: draw_steps is 1, given 2"):
        run(teacher, tmp_path / "part", resume=True, draw_steps=2)
    other = tmp_path / "other"
    train_video(other, steps=1, context_noise=0.5)
    with pytest.raises(ValueError, match="resume: .*another distilled: teacher is "):
        run(other, tmp_path / "part", resume=True)
    config = TrainConfig(**load_model(tmp_path / "part")[1]["train"])
    student = make_student(load_teacher(teacher)[0])
    with pytest.raises(ValueError, match="resume: .*another distilled: draw_steps is 1, given None"):
        train(student, Bar("classes"), tmp_path / "part", config, steps=8, resume=True, progress=False)


def test_what_cannot_be_distilled_is_named(teacher, tmp_path):
    def refused(checkpoint, message, **options):
        with pytest.raises(ValueError, match=message):
            distill(checkpoint, Bar("classes"), tmp_path / "student", **{"steps": 1, "progress": False, **options})
        assert not (tmp_path / "student").exists()

    train_image(tmp_path / "image", steps=1)
    refused(tmp_path / "image", "checkpoint: expected a video model, .*image is one of images")
    train_video(tmp_path / "shared", steps=1, context="shared")
    refused(
        tmp_path / "shared", "context: expected a model trained with finished frames, 'clean' or 'self', got 'shared'"
    )
    train_video(tmp_path / "noise", steps=1, objective="noise")
    refused(tmp_path / "noise", "objective: expected a model of flow matching, 'flow', got 'noise'")
    run(teacher, tmp_path / "again", steps=1)
    refused(tmp_path / "again", "objective: expected a model of flow matching, 'flow', got 'meanflow'")
    text = small(text_dim=5)
    settings = {"architecture": "VideoDiT", "model": text.config, "train": {"objective": "flow", "context": "clean"}}
    save_checkpoint(tmp_path / "text", {"ema": text.state_dict()}, settings)
    refused(tmp_path / "text", "text_dim: expected a model without text, got text_dim=5")
    refused(teacher, "draw_steps: expected 1 or 2, got 8", draw_steps=8)
    refused(teacher, "config: expected objective='meanflow', got 'flow'", config=TrainConfig())
    noisy = distill_config(load_teacher(teacher)[1], context_noise=0.8)
    refused(teacher, "context_noise: expected at most 0.5, which the teacher was trained with, got 0.8", config=noisy)
    train_video(tmp_path / "none", "none", steps=1)
    classless = distill_config(load_teacher(tmp_path / "none")[1], guidance=2.0)
    with pytest.raises(ValueError, match="guidance: expected 1 for a model without classes, got 2.0"):
        distill(tmp_path / "none", Bar("none"), tmp_path / "student", classless, steps=1)
    assert distill_config(load_teacher(tmp_path / "none")[1]).guidance == 1.0
