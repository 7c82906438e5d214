"""Training all frames in one pass is the loss of the frames evaluated one by one."""

import pytest
import torch
from stream_cases import conditions
from video_cases import CONDITION, CONDITIONS, MIXER, small

from pom_ext.diffusion import FlowMatching
from pom_ext.diffusion.losses import video_loss
from pom_ext.streaming import VideoStream
from pom_ext.streaming.stream import DRAWN, REMEMBERED


@MIXER
@CONDITION
@pytest.mark.parametrize("given", [0, 2])
def test_training_in_parallel_is_frame_by_frame_loss_for_loss(mixer, condition, given):
    """The loss of all frames in one pass is the mean of the losses of each frame after the finished ones before it."""
    model = small(mixer=mixer, **CONDITIONS[condition])
    recorded = []

    class Recorder(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            recorded.append((noisy, time, arguments))
            return model(noisy, time, **arguments)

    conditions_ = conditions(model, batch=3)
    text = {name: conditions_[name] for name in ("text", "text_weight") if name in conditions_}
    video, labels = torch.randn(3, 3, 12, 4, 6, dtype=torch.float64), conditions_.get("labels")
    loss = video_loss(Recorder(), FlowMatching(), video, labels, torch.Generator().manual_seed(0), given=given, **text)
    (noisy, time, arguments), past, losses = recorded[0], None, []
    assert torch.equal(arguments["finished"], video)
    assert (time[:, :given] == 0).all() and torch.equal(noisy[:, :, : 2 * given], video[:, :, : 2 * given])
    assert len(time[:, given:].unique()) == 3 * (6 - given)
    for frame in range(6):
        part = slice(2 * frame, 2 * frame + 2)
        out = model(noisy[:, :, part], time[:, frame], labels=labels, **text, frame_causal=True, past=past)
        t = time[:, frame].view(3, 1, 1, 1, 1) / 1000
        if frame >= given:
            noise = (noisy[:, :, part] - (1 - t) * video[:, :, part]) / t
            losses.append((out - (noise - video[:, :, part])).square().mean())
        finished = video[:, :, part], torch.zeros(3, dtype=torch.float64)
        _, past = model(*finished, labels=labels, **text, frame_causal=True, past=past, return_past=True)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-8, atol=1e-8)


def test_a_frame_is_remembered_with_noise_of_its_own():
    """Not with the noise that it was drawn from, which the training never showed."""
    stream = VideoStream(small(), batch=2, seed=7)
    drawn, remembered = stream._noise(3, DRAWN).flatten(), stream._noise(3, REMEMBERED).flatten()
    assert torch.corrcoef(torch.stack([drawn, remembered]))[0, 1].abs() < 4 / len(drawn) ** 0.5


def test_context_noise_gives_the_finished_frames_a_time_of_their_own():
    recorded = []

    class Recorder(torch.nn.Module):
        config = small().config

        def forward(self, noisy, time, **arguments):
            recorded.append(arguments)
            return noisy

    video = torch.randn(64, 3, 12, 4, 6, dtype=torch.float64)
    video_loss(Recorder(), FlowMatching(), video, None, torch.Generator().manual_seed(0), context_noise=0.5)
    finished, time = recorded[0]["finished"], recorded[0]["finished_time"]
    assert time.shape == (64,) and 0 <= time.min() < 30 and 470 < time.max() < 500
    share = (time / 1000).view(-1, 1, 1, 1, 1)
    noise = (finished - (1 - share) * video) / share
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert not torch.isclose(noise[:, :, 0], noise[:, :, 1]).any()


def test_shared_noise_has_one_time_for_a_video():
    model, recorded = small(), []

    class Recorder(torch.nn.Module):
        config = model.config

        def forward(self, noisy, time, **arguments):
            recorded.append((noisy, time, arguments))
            return torch.zeros_like(noisy)

    video = torch.randn(4, 3, 12, 4, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    loss = video_loss(Recorder(), FlowMatching(), video, None, generator, context="shared", given=1)
    noisy, time, arguments = recorded[0]
    assert arguments == {"labels": None, "frame_causal": True}
    assert (time[:, 0] == 0).all() and (time[:, 1:] == time[:, 1:2]).all() and len(time[:, 1].unique()) == 4
    assert torch.equal(noisy[:, :, :2], video[:, :, :2])
    assert loss > 1
    for given in (-1, 6):
        with pytest.raises(ValueError, match="given: expected 0 to 5 of 6 frames"):
            video_loss(Recorder(), FlowMatching(), video, None, generator, given=given)
    with pytest.raises(ValueError, match="context: expected one of clean, shared, got 'both'"):
        video_loss(Recorder(), FlowMatching(), video, None, generator, context="both")
