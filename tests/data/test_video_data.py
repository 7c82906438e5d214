"""Video to train on: what moves, what is pressed, and which frames of a file make a clip."""

import itertools

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pom_ext.data import GamePlay, MovingDigits, VideoFolder, is_video, open_video_dataset
from pom_ext.data.games import _load_game
from pom_ext.data.video_file import VideoFile
from pom_ext.media import write_video


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
        assert clip.min() >= -1 and clip.max() <= 1 and label == mnist.labels[image]
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
        assert straight.sum() >= 25 and pace[:-1][straight].min() >= 0.39
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


def test_clips_can_begin_anywhere_on_the_path(digits):
    later = MovingDigits(frames=8, size=32, seed=3, begin=32)
    firsts = set()
    for index in range(200):
        (clip, label), (whole, same) = later[index], digits[index]
        found = [first for first in range(33) if torch.equal(later.path(index), digits.path(index)[first : first + 8])]
        assert len(found) == 1 and torch.equal(clip, whole[:, found[0] : found[0] + 8]) and label == same
        firsts |= set(found)
    assert {0, 32} <= firsts and len(firsts) > 25
    again = MovingDigits(frames=8, size=32, seed=3, begin=32)
    assert torch.equal(again[5][0], later[5][0]) and torch.equal(again.path(99_999), later.path(99_999))


def test_clips_that_begin_at_the_start_are_those_of_before(digits):
    ends = torch.stack([digits.path(index)[39] for index in (7, 77_777)])  # as version 0.1.0 computed them
    torch.testing.assert_close(ends, torch.tensor([[10.702019, 2.868523], [3.296085, 6.294825]]), atol=1e-5, rtol=0)


def test_long_clips_keep_moving():
    digits = MovingDigits(frames=192, seed=1, begin=1000)
    for index in range(10):
        clip, path = digits[index][0], digits.path(index)
        assert clip.shape == (1, 192, 28, 28) and path.min() >= 0 and path.max() <= 8
        steps = path.diff(dim=0)
        assert torch.allclose(steps.abs().amax(0), steps.abs()[60:].amax(0), atol=1e-3), "as fast late as early"


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


def test_playing_the_labels_again_gives_the_same_frames():
    """Each label is that of its own frame, and fire is pressed twice when a game begins or a life is lost."""
    games = GamePlay("breakout", frames=2, size=16, recorded=800, seed=0)
    recorded = {}  # by number: the frame and its label, as the clips give them
    for index, start in enumerate(games.starts):
        clip, labels = games[index]
        recorded |= {start + f: (clip[:, f], labels[f].item()) for f in range(2)}
    assert len(recorded) == 800
    machine, lives, fires = _load_game("breakout"), 0, 0
    choices = machine.getMinimalActionSet()
    for number in range(800):
        if machine.game_over():
            machine.reset_game()
        picture, label = recorded[number]
        if machine.lives() != lives:  # 5 where a game begins
            fires += 1
            assert [recorded[n][1] for n in (number, number + 1)] == [games.classes.index("FIRE")] * 2
        lives = machine.lives()
        screens = []
        for _ in range(4):
            machine.act(choices[label])
            screens.append(torch.from_numpy(machine.getScreenRGB()))
        shown = torch.maximum(*screens[-2:]).permute(2, 0, 1)[None].float()
        shown = torch.nn.functional.interpolate(shown, size=(16, 16), mode="area")[0]
        torch.testing.assert_close(picture, shown / 127.5 - 1, atol=0.005, rtol=0)
    assert fires > 6, "more than one game"


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
    assert [(film.path.name, first) for film, first, _ in data.clips] == [
        (name, first) for name, count in counts.items() for first in range(0, count - 9, 10)
    ]
    for index in (5, 0, len(data) - 1, 7):
        film, first, label = data.clips[index]
        path, (clip, found) = film.path, data[index]
        assert clip.shape == (3, 4, 16, 16) and found == label == (path.parent.name == "dogs")
        wanted = torch.linspace(-1, 1, counts[path.name])[first : first + 10 : 3]
        torch.testing.assert_close(clip.mean((0, 2, 3)), wanted, atol=0.02, rtol=0)
    assert data.fps == pytest.approx(10 / 3)


# Encoders that store frames in another order than they show them, in containers with and without presentation times.
FILMS = {
    "closed.mkv": ("libx264", {"x264-params": "keyint=12:bframes=3:b-adapt=0:scenecut=0"}, {}),
    "open.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=12:bframes=3:b-adapt=0:scenecut=0"}, {}),
    "fragments.mov": ("libx264", {"x264-params": "keyint=12:bframes=3"}, {"movflags": "frag_keyframe+empty_moov"}),
    "h264.avi": ("libx264", {"g": "12", "bf": "3"}, {}),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "g": "12"}, {}),
    "program.mpg": ("mpeg2video", {"bf": "2", "g": "12"}, {}),
    "vp9.webm": ("libvpx-vp9", {"g": "12", "cpu-used": "8"}, {}),
}


def encode(path, codec, options, container):
    """70 frames that are each brighter than the one before."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
        for number in range(70):
            pixels = np.full((48, 64, 3), 20 + 3 * number, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))


@pytest.mark.parametrize("name", FILMS)
def test_frames_are_the_same_from_the_middle_as_from_the_start(name, tmp_path):
    encode(tmp_path / name, *FILMS[name])
    with av.open(str(tmp_path / name)) as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    film = VideoFile(tmp_path / name)
    assert len(film.times) == len(shown) == 70
    for first in (66, *range(8, 32)):  # of every place between two key frames
        read = film.read(range(first, first + 4, 3))
        assert len(read) == 2
        for frame, number in zip(read, (first, first + 3), strict=True):
            assert np.array_equal(frame.to_ndarray(format="rgb24"), shown[number])


def test_what_was_trimmed_from_the_start_is_not_counted(tmp_path):
    """Cutting without encoding keeps the frames from the key frame on, and says that some are not shown."""
    encode(tmp_path / "whole.mp4", *FILMS["closed.mkv"])
    with av.open(str(tmp_path / "whole.mp4")) as whole:
        stream = whole.streams.video[0]
        packets = [packet for packet in whole.demux(stream) if packet.dts is not None]
        options = {"avoid_negative_ts": "disabled"}
        with av.open(str(tmp_path / "part.mp4"), "w", container_options=options) as part:
            copy = part.add_stream_from_template(stream)
            assert packets[12].is_keyframe
            cut = packets[17].pts
            for packet in packets[12:]:
                packet.pts, packet.dts = packet.pts - cut, packet.dts - cut
                packet.stream = copy
                part.mux(packet)
    with av.open(str(tmp_path / "part.mp4")) as file:
        shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    film = VideoFile(tmp_path / "part.mp4")
    assert len(film.times) == len(shown) < 58
    for first in (0, 1, 30):
        assert np.array_equal(film.read(range(first, first + 1))[0].to_ndarray(format="rgb24"), shown[first])


def test_a_film_that_ends_early_is_named(tmp_path):
    encode(tmp_path / "film.mp4", *FILMS["open.mp4"])
    film = VideoFile(tmp_path / "film.mp4")
    film.times.append(film.times[-1] + 512)
    with pytest.raises(ValueError, match="data: .*film.mp4 gave 3 of 4 frames asked for; it is damaged"):
        film.read(range(67, 71))


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
    (tmp_path / "broken.mp4").unlink()
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "folder.mp4" / "sound.mkv"), "w") as file:
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        stream = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        file.mux(stream.encode(sound))
    with pytest.raises(ValueError, match="data: .*sound.mkv holds no video"):
        VideoFolder(tmp_path)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MovingDigits(frames=0), "frames, size: expected at least 1 and 28, got 0 and 28"),
        (lambda: MovingDigits(size=27), "frames, size: expected at least 1 and 28, got 8 and 27"),
        (lambda: MovingDigits(begin=-1), "begin: expected at least 0, the first frame of a path, got -1"),
        (lambda: GamePlay("pongg"), "game: expected one of .*, such as .*pong.*, got 'pongg'"),
        (lambda: GamePlay(frames=8, recorded=7), "recorded: no game of 'pong' in 7 frames is as long as a clip of 8"),
        (lambda: GamePlay(size=4), "frames, size, recorded: expected at least 1, 8 and 1, got 8, 4 and 6000"),
        (lambda: GamePlay(recorded=0), "frames, size, recorded: expected at least 1, 8 and 1, got 8, 64 and 0"),
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
    assert open_video_dataset(films, frames=5, size=8).shape == (3, 5, 8, 8) and not is_video(films)
    with pytest.raises(ValueError, match="game: expected one of"):
        open_video_dataset("game:chess960")
