"""The measures of a stream: real moving digits pass, and every kind of bad stream fails the measure meant for it."""

import pytest
import torch

from pom_ext.data import MovingDigits
from pom_ext.demo.measures import (
    SPANS,
    by_length,
    centre,
    clip_features,
    frechet,
    motion,
    real_videos,
    train_judges,
)

LABELS = torch.arange(10).repeat_interleave(3)


def block(corners, side=4, size=28):
    """(1, 1, T, size, size): a white square with its upper left corner at (row, column)."""
    video = torch.full((1, 1, len(corners), size, size), -1.0)
    for frame, (row, column) in enumerate(corners):
        video[0, 0, frame, row : row + side, column : column + side] = 1
    return video


def test_motion_of_a_square_by_hand():
    turns = block([(2, 3), (2, 5), (2, 7), (5, 7)])  # two steps of 2 to the right, one of 3 down
    assert torch.allclose(centre(turns)[0], torch.tensor([[3.5, 4.5], [3.5, 6.5], [3.5, 8.5], [6.5, 8.5]]))
    measured = motion(turns)
    assert measured["speed"] == pytest.approx(7 / 3)
    assert measured["acceleration"] == pytest.approx((0 + 13**0.5) / 2, abs=1e-5)
    assert measured["cosine"] == pytest.approx(0.5, abs=1e-5) and measured["mass"] == pytest.approx(16)


def test_motion_of_both_axes_and_of_values_out_of_range():
    wide = torch.full((1, 1, 3, 8, 20), -3.0)
    wide[0, 0, range(3), 7, [15, 17, 19]] = 5.0
    assert centre(wide)[0].tolist() == [[7, 15], [7, 17], [7, 19]]
    assert motion(wide)["mass"] == 1 and motion(torch.full_like(wide, -1)) == dict.fromkeys(motion(wide), 0.0)
    with pytest.raises(ValueError, match="video: expected .* at least 3 frames, got"):
        motion(wide[:, :, :2])


def test_frechet_distance_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    whitened = sample - sample.mean(0)
    whitened = whitened @ torch.linalg.inv(torch.linalg.cholesky(whitened.T.cov())).T  # mean 0, covariance 1
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.0, -4.0]).double()
    assert frechet(whitened, whitened * scale + shift) == pytest.approx(25 + 1 + 0.25, abs=1e-9)
    assert frechet(whitened, whitened) == pytest.approx(0, abs=1e-9)
    few = whitened[:2]  # covariances without full rank
    assert frechet(few, whitened) == pytest.approx(frechet(whitened, few)) and frechet(few, whitened) > 0
    mixed = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    first, second = mixed @ mixed.T, torch.diag(scale)
    values = torch.linalg.eigvals(first @ second).real.sqrt().sum()
    drawn = [whitened @ torch.linalg.cholesky(covariance).T for covariance in (first, second)]
    assert frechet(*drawn) == pytest.approx((first.trace() + second.trace() - 2 * values).item(), abs=1e-9)
    with pytest.raises(ValueError, match="first, second: expected at least two rows of the same features"):
        frechet(whitened, whitened[:, :2])


@pytest.fixture(scope="module")
def data():
    return MovingDigits(frames=64, seed=5, begin=32)


@pytest.fixture(scope="module")
def judges():
    """The classifier of frames and the network of clips."""
    classifier, net, reached = train_judges(192)
    told = reached["clip_net_on_real_clips"]
    assert reached["classifier_accuracy_on_real_frames"] > 0.94 and told["digit"] > 0.94
    assert told["step_error"] < told["step"] / 3
    return classifier, net


@pytest.fixture(scope="module")
def real(data):
    return real_videos(data, LABELS.repeat(2), seed=1)


@pytest.fixture
def video(data):
    return real_videos(data, LABELS, seed=2)


@pytest.fixture
def measure(judges, real):
    """A function of a video: the rows of `by_length`, for 0 to 8, 8 to 24 and 24 to 64."""
    return lambda video: by_length(video, LABELS, *judges, real)


def shifted(video, rows, columns):
    """Every frame moved by whole pixels, (B, T) each."""
    frames = video.transpose(1, 2).flatten(0, 1)
    steps = zip(rows.flatten().tolist(), columns.flatten().tolist())
    moved = [frame.roll(step, (1, 2)) for frame, step in zip(frames, steps)]
    return torch.stack(moved).unflatten(0, (len(video), -1)).transpose(1, 2)


def is_real(row):
    """Whether a row of measures could be that of a good stream, by the bounds this project sets itself."""
    return {
        "read": row["read"] >= 0.9,
        "speed": abs(row["speed"] / row["speed_real"] - 1) < 0.25,
        "acceleration": row["acceleration"] < 2 * row["acceleration_real"],
        "cosine": row["cosine"] > 0.6,
        "mass": abs(row["mass"] / row["mass_real"] - 1) < 0.2,
        "frechet": row["frechet"] < 2 * row["frechet_real"],
    }


def failed(rows):
    """For each span the names of the measures that tell it from a real one."""
    return [{name for name, passed in is_real(row).items() if not passed} for row in rows]


def test_real_videos_pass(measure, video):
    rows = measure(video)
    assert [row["frames"] for row in rows] == [list(span) for span in SPANS[:3]], "the video ends at frame 64"
    assert failed(rows) == [set()] * 3, rows
    assert all(0.5 < row["speed_real"] < 0.9 and row["acceleration_real"] < 0.3 for row in rows)


def test_jitter_fails_by_acceleration(measure, video):
    steps = torch.randint(-1, 2, (2, *video.shape[:1], 64), generator=torch.Generator().manual_seed(0))
    rows = measure(shifted(video, *steps))
    for names in failed(rows):
        assert {"acceleration", "cosine", "frechet"} <= names and not {"mass"} & names


def test_frozen_digits_fail_by_speed(measure, video):
    rows = measure(video[:, :, :1].expand_as(video))
    for row, names in zip(rows, failed(rows)):
        assert {"speed", "cosine"} <= names and "mass" not in names
        assert row["frames"][0] == 0 or "frechet" in names, "thirty clips of the first eight frames are too few"
        assert row["speed"] == row["acceleration"] == 0


@pytest.mark.parametrize("power", (3.0, 1 / 3))
def test_digits_that_fade_or_thicken_fail_by_mass(measure, video, power):
    light = (torch.nn.functional.max_pool3d(video, (1, 3, 3), 1, (0, 1, 1)) if power < 1 else video) / 2 + 0.5
    late = torch.linspace(0, 1, 64).view(1, 1, -1, 1, 1)  # gradually
    rows = measure(torch.lerp(video, 2 * light**power - 1, late))
    assert "mass" not in failed(rows)[0] and "mass" in failed(rows)[2], rows
    assert "speed" not in failed(rows)[2]


def test_digits_of_another_class_fail_by_reading(measure, data):
    rows = measure(real_videos(data, (LABELS + 1) % 10, seed=2))
    for row, names in zip(rows, failed(rows)):
        assert names <= {"read", "mass"} and row["read"] < 0.1


def test_digits_that_turn_into_others_fail_late(measure, data, video):
    other = real_videos(data, LABELS.flip(0), seed=2)
    rows = measure(torch.cat([video[:, :, :24], other[:, :, 24:]], dim=2))
    assert failed(rows)[:2] == [set(), set()] and "read" in failed(rows)[2]


def test_shuffled_frames_fail_by_motion(measure, video):
    order = torch.cat([span[0] + torch.randperm(span[1] - span[0]) for span in SPANS[:3]])
    rows = measure(video[:, :, order])
    for names in failed(rows):
        assert {"speed", "acceleration", "cosine", "frechet"} <= names and not {"read", "mass"} & names


def test_frames_played_backward_are_real(measure, video):
    """Digits that bounce obey the same laws backward: what is measured is motion, not its direction."""
    rows = measure(video.flip(2))
    assert failed(rows) == [set()] * 3


def test_clips_are_cut_from_videos_in_order(judges, video):
    features = clip_features(judges[1], video[:2])
    assert features.shape == (16, 32)
    one = clip_features(judges[1], video[1:2, :, 8:16])
    torch.testing.assert_close(features[9:10], one, atol=1e-4, rtol=1e-4)


def test_real_videos_follow_from_labels_and_seed(data):
    videos = real_videos(data, LABELS, seed=4)
    assert videos.shape == (30, 1, 64, 28, 28)
    assert torch.equal(videos, real_videos(data, LABELS, seed=4))
    assert not torch.equal(videos, real_videos(data, LABELS, seed=5))


def test_bad_arguments_are_named(video, real):
    with pytest.raises(ValueError, match="labels: expected one for each of 30 videos, got"):
        by_length(video, LABELS[:3], None, None, real)
    with pytest.raises(ValueError, match="real: expected 60 videos of at least 64 frames, got 30 of 64"):
        by_length(video, LABELS, None, None, real[:30])
    with pytest.raises(ValueError, match="real: expected 60 videos of at least 64 frames, got 60 of 8"):
        by_length(video, LABELS, None, None, real[:, :, :8])
