"""Training on video: both contexts, classes, actions or neither, resume, and the way back from a checkpoint."""

import pytest
import torch
from torch.utils.data import Dataset

from pom_ext._random import seeded_generator
from pom_ext.diffusion import OBJECTIVES
from pom_ext.diffusion.context import TRAINED_CONTEXTS, stream_context
from pom_ext.diffusion.guidance import drop_labels
from pom_ext.models import ImageDiT, VideoDiT
from pom_ext.models.checkpoint import load_model, read_checkpoint, save_checkpoint
from pom_ext.streaming import VideoStream
from pom_ext.training import TrainConfig, train

KINDS = {"classes": 2, "actions": 3, "none": 0}


class Bar(Dataset):
    """A bright column that steps to the right from frame to frame; with actions it stays, or steps left or right."""

    def __init__(self, kind, frames=6):
        self.shape = (1, frames, 8, 8)
        self.kind, self.classes, self.actions = kind, tuple("abc"[: KINDS[kind]]), kind == "actions"

    def __len__(self):
        return 12

    def __getitem__(self, index):
        steps = torch.tensor([0, -1, 1])
        frames = torch.arange(self.shape[1])
        labels = torch.randint(0, 3, frames.shape, generator=seeded_generator(index))
        places = index + (steps[labels].cumsum(0) if self.actions else frames)
        clip = torch.full(self.shape, -1.0)
        clip[0, frames, :, places % 8] = 1
        return clip, labels if self.actions else torch.tensor(index % 2 if self.classes else 0)

    def describe(self):
        return {"shape": list(self.shape), "classes": list(self.classes), "actions": self.actions}


def run(path, kind="classes", steps=6, resume=False, dataset=None, late=None, save_every=1000, **config):
    torch.manual_seed(0)
    model = VideoDiT(
        1, (8, 8), 6, n_classes=KINDS[kind], patch=(1, 4, 4), dim=16, n_layers=1, n_heads=2, positions="space"
    )
    config = TrainConfig(**{"batch_size": 4, "warmup": 2, "lr": 1e-2, **config})
    dataset = dataset or Bar(kind)
    options = {"late": late, "steps": steps, "resume": resume, "save_every": save_every}
    return train(model, dataset, path, config, progress=False, **options)


@pytest.mark.parametrize("context", TRAINED_CONTEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_training_learns_the_videos_and_streams_go_on_from_the_file(kind, context, tmp_path):
    path = tmp_path / "model.safetensors"
    result = run(path, kind, steps=60, context=context)
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])
    model, settings = load_model(path)
    assert isinstance(model, VideoDiT) and not model.training
    assert settings["train"]["context"] == context and settings["data"]["actions"] == (kind == "actions")
    for (name, tensor), expected in zip(model.state_dict().items(), result.model.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name
    stream = VideoStream(model, [0] if model.n_classes else None, context=stream_context(context), steps=2)
    assert settings["train"]["context"] == context and stream.next().shape == (1, 1, 1, 8, 8)


class Interrupted(Exception):
    pass


class InterruptedBar(Bar):
    """Fails when the clip after `left` others is read."""

    def __init__(self, kind, left):
        super().__init__(kind)
        self.left = left

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().__getitem__(index)


def test_an_interrupted_run_resumes_to_the_very_same_losses(tmp_path):
    whole = run(tmp_path / "whole.safetensors", "actions", given=1)
    path = tmp_path / "model.safetensors"
    with pytest.raises(Interrupted):
        run(path, "actions", dataset=InterruptedBar("actions", 4 * 5), save_every=2, given=1)
    assert read_checkpoint(path)[1]["step"] == 4
    with pytest.raises(ValueError, match="trained with another train: context is clean, given shared"):
        run(path, "actions", resume=True, given=1, context="shared")
    assert run(path, "actions", resume=True, given=1).losses == whole.losses


class Counted(Bar):
    """Keeps which clips were read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def test_longer_clips_late_in_the_training(tmp_path):
    """From a share of the training on, in batches of as many frames; an interrupted run resumes on either side."""
    short, long = Counted("classes"), Counted("classes", 12)
    path, options = tmp_path / "model.safetensors", {"steps": 10, "late_from": 0.6}
    whole = run(path, dataset=short, late=long, **options)
    assert (len(short.read), len(long.read)) == (6 * 4, 4 * 2)
    assert read_checkpoint(path)[1]["data"]["late"] == long.describe()
    for left, kind in ((4 * 3, 0), (2 * 3, 1)):  # interrupted after 2 or 3 batches of short or long clips
        path = tmp_path / f"{kind}.safetensors"
        data = {"dataset": Bar("classes"), "late": Bar("classes", 12)}
        broken = InterruptedBar("classes", left)
        broken.shape = (1, 12 if kind else 6, 8, 8)
        with pytest.raises(Interrupted):
            run(path, save_every=2, **data | {("dataset", "late")[kind]: broken}, **options)
        assert run(path, resume=True, **data, **options).losses == whole.losses
    with pytest.raises(ValueError, match="the data has 3"):
        run(tmp_path / "other.safetensors", late=Bar("actions"))


def test_late_clips_that_do_not_fit_are_named_before_the_training(tmp_path):
    wide, path = Bar("classes", 12), tmp_path / "x"
    wide.shape = (1, 12, 8, 12)
    with pytest.raises(ValueError, match=r"late: expected clips .* \[1, 6, 8, 8\], but for T, got \[1, 12, 8, 12\]"):
        run(path, late=wide)
    with pytest.raises(ValueError, match="late: expected a multiple of patch.* more than given=3 frames.*, got 3"):
        run(path, late=Bar("classes", 3), given=3)
    model = VideoDiT(1, (8, 8), 6, n_classes=2, patch=(2, 4, 4), dim=16, n_layers=1, n_heads=2)
    for frames, message in (
        (9, "a multiple of patch.0.=2 video frames, .* got 9"),
        (12, "at most length=6 .*, got 12"),
    ):
        with pytest.raises(ValueError, match=f"late: expected {message}"):
            train(model, Bar("classes"), path, late=Bar("classes", frames), steps=4, progress=False)
    image = ImageDiT(1, 2, 8, patch=4, dim=16, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="late: expected None for images, got Bar"):
        train(image, Bar("classes"), path, late=Bar("classes"), steps=4, progress=False)
    assert not path.exists()


def test_checkpoints_from_before_a_setting_resume(tmp_path):
    path = tmp_path / "model.safetensors"
    whole = run(tmp_path / "whole.safetensors", "actions").losses
    with pytest.raises(Interrupted):
        run(path, "actions", dataset=InterruptedBar("actions", 4 * 5), save_every=2)
    parts, settings = read_checkpoint(path)
    del settings["train"]["late_from"]
    save_checkpoint(path, parts, settings)
    assert run(path, "actions", resume=True).losses == whole


def test_two_frames_before_are_not_one(tmp_path):
    """local_conv=True is two frames before a frame's own, 1 is one, and in Python True == 1."""
    path = tmp_path / "model.safetensors"
    run(path)
    model = VideoDiT(**{**load_model(path)[0].config, "local_conv": 1})
    config = TrainConfig(batch_size=4, warmup=2, lr=1e-2)
    with pytest.raises(ValueError, match="resume: .* another model: local_conv is True, given 1"):
        train(model, Bar("classes"), path, config, steps=8, resume=True, progress=False)


def test_the_first_frames_given_do_not_count(tmp_path):
    losses = [run(tmp_path / f"{given}.safetensors", steps=1, given=given).losses for given in (0, 5)]
    assert losses[0] != losses[1]
    with pytest.raises(ValueError, match="given: expected 0 to 5 of 6 frames, got 6"):
        run(tmp_path / "6.safetensors", given=6)


@pytest.mark.parametrize("options, message", [({"context": "both"}, "context: expected one"), ({"given": -1}, "given")])
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_models_and_videos_that_do_not_fit(tmp_path):
    model = VideoDiT(1, (8, 8), 6, n_classes=3, patch=(1, 4, 4), dim=16, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="model: made for 3 classes, the data has 2"):
        train(model, Bar("classes"), tmp_path / "x", steps=1, progress=False)
    assert not (tmp_path / "x").exists()


def test_actions_of_a_video_are_dropped_together():
    labels = torch.arange(6000).view(1000, 6) % 5
    dropped = drop_labels(labels, 9, 0.3, seeded_generator(0))
    none = (dropped == 9).sum(1)
    assert set(none.tolist()) == {0, 6}
    assert abs((none == 6).double().mean() - 0.3) < 0.05


def test_checkpoints_tell_images_from_videos(tmp_path):
    from training_cases import run as run_images

    run_images(tmp_path / "image.safetensors", steps=1)
    assert isinstance(load_model(tmp_path / "image.safetensors")[0], ImageDiT)


@pytest.mark.parametrize("objective", OBJECTIVES.values())
def test_data_of_another_kind_are_named(objective):
    """Images for a video model, clips for an image model."""
    generator, labels = torch.Generator(), torch.tensor([0, 1])
    options = {"n_classes": 4, "dim": 16, "n_layers": 1, "n_heads": 2, **objective.model_options}
    video = VideoDiT(3, (8, 8), length=4, patch=(1, 4, 4), **options)
    image = ImageDiT(3, image_size=8, patch=4, **options)
    if objective.for_video:
        with pytest.raises(ValueError, match="video: expected"):
            objective().loss(video, torch.zeros(2, 3, 8, 8), labels, generator)
    with pytest.raises(ValueError, match="images: expected shape"):
        objective().loss(image, torch.zeros(2, 3, 4, 8, 8), labels, generator)
