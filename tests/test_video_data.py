"""Video to train on: what moves, what is pressed, and which frames of a file make a clip."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader

from pom_ext.video_data import GamePlay, MovingDigits, VideoFolder, is_video, open_video_dataset
from pom_ext.video_files import write_video


@pytest.fixture(scope="module")
def digits():
    return MovingDigits(frames=40, size=32, seed=3)


def test_digits_start_in_the_middle_as_the_image_they_are(digits):
    from pom_ext.data import MNIST

    mnist = MNIST()
    for index in (0, 7, 4321, 5007):
        clip, label = digits[index]
        image = index % 5000
        assert clip.shape == (1, 40, 32, 32) and clip.dtype == torch.float32
        assert -1 <= clip.min() and clip.max() <= 1 and label == mnist.labels[image]
        torch.testing.assert_close(clip[0, 0, 6:26, 6:26], mnist.images[image, 0, 4:24, 4:24], atol=1e-5, rtol=0)
    assert len(digits) == 100_000 and digits.classes == tuple("0123456789") and not digits.actions


def test_digits_move_in_lines_at_an_even_pace_and_bounce(digits):
    bounced = False
    for index in range(20):
        path = digits.path(index)
        steps = path[1:] - path[:-1]
        assert path.min() >= 0 and path.max() <= 12
        pace = steps.norm(dim=1)
        assert pace.max() <= 1.01
        straight = (steps[1:] - steps[:-1]).abs().amax(1) < 1e-4
        assert straight.sum() >= 25 and 0.39 <= pace[:-1][straight].min()
        bounced |= not straight.all()
        mass = (digits[index][0] + 1).sum((0, 2, 3))
        assert (mass - mass[0]).abs().max() < 0.03 * mass[0], "no part of the digit is lost"
    assert bounced
    assert not torch.equal(digits.path(7), digits.path(5007)), "one image, other paths"


def test_clips_follow_from_the_seed_and_the_index(digits):
    again, other = MovingDigits(frames=40, size=32, seed=3), MovingDigits(frames=40, size=32, seed=4)
    assert torch.equal(digits[5][0], again[5][0]) and not torch.equal(digits[5][0], other[5][0])
    loaded = list(itertools.islice(DataLoader(digits, batch_size=3, num_workers=2), 2))
    for batch, (clips, labels) in enumerate(loaded):
        for i in range(3):
            clip, label = digits[3 * batch + i]
            assert torch.equal(clips[i], clip) and labels[i] == label
    with pytest.raises(IndexError):
        digits[100_000]


@pytest.fixture(scope="module")
def pong():
    return GamePlay("pong", frames=6, size=64, recorded=900, seed=1)


def paddle(picture):
    """Row of the player's paddle, green, near the right edge; None where it is out of sight."""
    red, green = picture[0, 10:60, 56:58], picture[1, 10:60, 56:58]
    bright = ((green - red) > 0.15).float().sum(1)
    return (bright * torch.arange(50)).sum().item() / bright.sum().item() if bright.sum() > 0 else None


def test_pong_answers_to_the_action_of_the_same_frame(pong):
    """RIGHT moves the paddle up, LEFT down; the paddle has inertia, so the action is held for a while first."""
    assert pong.classes == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    moves = {"RIGHT": [], "LEFT": []}
    for index in range(len(pong)):
        clip, labels = pong[index]
        assert clip.shape == (3, 6, 64, 64) and labels.shape == (6,)
        names = {pong.classes[label].removesuffix("FIRE") for label in labels[2:].tolist()}
        rows = paddle(clip[:, 2]), paddle(clip[:, 5])
        if len(names) == 1 and (name := names.pop()) in moves and None not in rows and 4 < rows[0] < 45:
            moves[name].append(rows[1] - rows[0])
    up, down = (torch.tensor(moves[name]) for name in ("RIGHT", "LEFT"))
    assert len(up) > 10 and len(down) > 10
    assert up.mean() < -3 and down.mean() > 3


def test_recordings_follow_from_the_seed(pong):
    again, other = (GamePlay("pong", frames=6, size=64, recorded=100, seed=seed) for seed in (1, 2))
    assert torch.equal(again.pictures, pong.pictures[:100]) and torch.equal(again.labels, pong.labels[:100])
    assert not torch.equal(other.labels, again.labels)


def test_no_clip_spans_two_games():
    games = GamePlay("breakout", frames=8, size=16, recorded=1500, seed=0)
    pictures, labels, classes, spans = games._play("breakout", 1500, 0)
    assert len(spans) > 2 and spans[0][0] == 0 and spans[-1][1] == 1500
    assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    inside = [start for start in games.starts if any(first <= start and start + 8 <= last for first, last in spans)]
    assert inside == games.starts and len(games) == 1500 - 7 * len(spans)
    assert classes == ("NOOP", "FIRE", "RIGHT", "LEFT") and pictures.dtype == torch.uint8
    assert set(labels.tolist()) == {0, 1, 2, 3}


def numbered(path, frames, size=(32, 48)):
    """A video whose frame n is n steps of grey bright."""
    steps = torch.linspace(-1, 1, frames).view(1, frames, 1, 1).expand(3, -1, *size)
    write_video(path, steps, fps=10)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    for name, frames in (("cats/a.mp4", 60), ("cats/deep/b.gif", 25), ("dogs/c.mp4", 33), ("dogs/short.mp4", 3)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        numbered(root / name, frames)
    (root / "dogs" / "notes.txt").write_text("no video")
    return root


def test_folders_give_clips_frame_by_frame(films):
    data = VideoFolder(films, frames=4, size=16, stride=3)  # a clip is ten frames long
    assert data.classes == ("cats", "dogs") and data.shape == (3, 4, 16, 16)
    counts = {"a.mp4": 60, "b.gif": 25, "c.mp4": 33}
    assert [(clip[0].name, clip[2]) for clip in data.clips] == [
        (name, first) for name, count in counts.items() for first in range(0, count - 9, 10)
    ]
    for index in (5, 0, len(data) - 1, 7):
        path, _, first, label = data.clips[index]
        clip, found = data[index]
        assert clip.shape == (3, 4, 16, 16) and found == label == (path.parent.name == "dogs")
        wanted = torch.linspace(-1, 1, counts[path.name])[first : first + 10 : 3]
        torch.testing.assert_close(clip.mean((0, 2, 3)), wanted, atol=0.02, rtol=0)
    assert data.fps == pytest.approx(10 / 3)


def test_folders_without_folders_have_no_classes(films):
    data = VideoFolder(films / "dogs", frames=16, size=8)
    assert data.classes == () and len(data) == 2 and data[1][1] == 0


def test_pictures_are_cut_to_their_middle(tmp_path):
    video = torch.full((3, 2, 32, 64), -1.0)
    video[:, :, :, 16:48] = 1
    write_video(tmp_path / "wide.mp4", video)
    assert VideoFolder(tmp_path, frames=2, size=8)[0][0].min() > 0.8  # but for the blur of the edge


def test_folders_that_hold_no_clips_are_named(films, tmp_path):
    with pytest.raises(ValueError, match="data: expected a folder of videos, got .*nowhere"):
        VideoFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"data: no videos \(.avi, .*\) in"):
        VideoFolder(tmp_path)
    with pytest.raises(
        ValueError, match="frames: clips of 61 frames, 1 apart, are longer than every video in .*, at most 60"
    ):
        VideoFolder(films, frames=61)
    (tmp_path / "broken.mp4").write_bytes(b"no video at all")
    with pytest.raises(ValueError, match="data: cannot read the video .*broken.mp4"):
        VideoFolder(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MovingDigits(frames=0), "frames, size: expected at least 1 and 28, got 0 and 28"),
        (lambda: MovingDigits(size=27), "frames, size: expected at least 1 and 28, got 8 and 27"),
        (lambda: GamePlay("pongg"), "game: expected one of .*, such as .*pong.*, got 'pongg'"),
        (lambda: GamePlay(frames=8, recorded=7), "recorded: no game of 'pong' in 7 frames is as long as a clip of 8"),
        (lambda: GamePlay(size=4), "frames, size: expected at least 1 and 8"),
        (lambda: VideoFolder(".", stride=0), "frames, size, stride: expected at least 1"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_of_the_command_line(films):
    assert is_video("moving-digits") and is_video("game:pong") and not is_video("mnist") and not is_video(str(films))
    data = open_video_dataset("moving-digits", frames=3)
    assert data.shape == (1, 3, 28, 28)
    assert data.describe() == {"shape": [1, 3, 28, 28], "classes": list("0123456789"), "actions": False, "fps": 8.0}
    assert open_video_dataset(str(films), frames=5, size=8).shape == (3, 5, 8, 8)
    with pytest.raises(ValueError, match="game: expected one of"):
        open_video_dataset("game:chess960")
