"""An image model as the beginning of a video model."""

import pytest
import torch

from pom_ext.models import ImageDiT, inflate

SMALL = {"in_channels": 3, "n_classes": 4, "image_size": 8, "patch": 2, "dim": 16, "n_layers": 3, "n_heads": 2}


def image_model(**changes):
    torch.manual_seed(0)
    model = ImageDiT(**SMALL | changes).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("local_conv", [True, False])
@pytest.mark.parametrize("mixer", ["product", "power", "attention", ["power", "attention", "product"]])
@torch.no_grad()
def test_of_a_still_video_it_predicts_what_the_image_model_does(frames, local_conv, mixer):
    model = image_model(mixer=mixer, local_conv=local_conv, degree=4, expand=1)
    video = inflate(model, length=8, frames=frames)
    picture, time, labels = (
        torch.randn(2, 3, 8, 8, dtype=torch.float64),
        torch.tensor([10.0, 700.0]),
        torch.tensor([1, 4]),
    )
    expected = model(picture, time, labels)[:, :, None].expand(-1, -1, frames, -1, -1)
    still = picture[:, :, None].expand(-1, -1, frames, -1, -1)
    torch.testing.assert_close(video(still, time, labels=labels), expected)
    assert video.config["length"] == 8 and video.size == (8, 8)


@torch.no_grad()
def test_a_model_of_two_times_stays_one():
    model, time = image_model(two_times=True), torch.tensor([300.0, 700.0])
    video = inflate(model, length=8, read="split", fade="head")
    picture, labels = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1, 4])
    for span in (None, time / 2):
        expected = model(picture, time, labels, span)
        torch.testing.assert_close(video(picture[:, :, None], time, None, labels, span)[:, :, 0], expected)
    assert not torch.allclose(expected, model(picture, time, labels)), "the span counts"
    assert not inflate(image_model(), length=8).config["two_times"]


@torch.no_grad()
def test_another_size_and_dtype():
    video = inflate(image_model().float(), length=4, size=(12, 6))
    out = video(torch.randn(1, 3, 4, 12, 6), torch.zeros(1), labels=torch.zeros(1, dtype=torch.long), frame_causal=True)
    assert out.shape == (1, 3, 4, 12, 6) and out.dtype == torch.float32


@pytest.mark.parametrize(
    "model, error, message",
    [
        (lambda: torch.nn.Linear(1, 1), TypeError, "model: expected an ImageDiT, got Linear"),
        (lambda: image_model(n_registers=2), ValueError, "model: expected n_registers=0, got 2"),
        (
            lambda: image_model(mixer="local"),
            ValueError,
            r"model: expected mixers of .*attention\+power, got local",
        ),
        (lambda: image_model(dim=20), ValueError, "dim: expected a multiple of 8"),
    ],
)
def test_image_models_without_a_video_counterpart(model, error, message):
    with pytest.raises(error, match=message):
        inflate(model(), length=4)
