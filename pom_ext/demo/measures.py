"""Measures that a bad stream of moving digits fails: whether it is read, moves, keeps its strokes, and looks real.

Videos and clips are (B, 1, T, H, W) float32 in [-1, 1]. Lengths are in pixels, times in frames.
"""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .._random import seeded_generator
from ..data import MovingDigits
from .classifier import train_classifier

SPANS = ((0, 8), (8, 24), (24, 64), (64, 192))  # first frame and end of what is measured together
CLIP, WIDTH = 8, 32  # frames of a clip that is compared, and the number of its features


def brightness(video):
    """(B, T, H, W) in [0, 1]; values outside are clamped."""
    return (video[:, 0].clamp(-1, 1) + 1) / 2


def centre(video):
    """(B, T, 2): row and column of the centre of mass of every frame; (0, 0) for a black one."""
    light = brightness(video)
    mass = light.sum((2, 3)).clamp_min(1e-6)
    rows, columns = (torch.arange(size, device=light.device, dtype=light.dtype) for size in light.shape[2:])
    return torch.stack([(light.sum(3) @ rows) / mass, (light.sum(2) @ columns) / mass], dim=2)


def motion(video):
    """How the centre of mass moves, and how much there is to see.

    A step is what the centre moves from one frame to the next.

    Returns:
        means over videos and frames as floats: "speed", the length of a step; "acceleration", the length of the change
        from a step to the next; "cosine" of the angle between the two, 0 where nothing moves; "mass", the sum of the
        brightness in [0, 1] of a frame.

    Raises:
        ValueError: fewer than three frames, which have no acceleration.
    """
    if video.dim() != 5 or video.shape[1] != 1 or video.shape[2] < 3:
        raise ValueError(f"video: expected (B, 1, T, H, W) with at least 3 frames, got {tuple(video.shape)}")
    steps = centre(video).diff(dim=1)
    return {
        "speed": steps.norm(dim=2).mean().item(),
        "acceleration": steps.diff(dim=1).norm(dim=2).mean().item(),
        "cosine": F.cosine_similarity(steps[:, 1:], steps[:, :-1], dim=2).mean().item(),
        "mass": brightness(video).sum((2, 3)).mean().item(),
    }


class ClipNet(nn.Module):
    """A 3-D convolutional network that tells the digit of a clip of 8 frames of 28 x 28 pixels, and how it moves."""

    def __init__(self):
        super().__init__()

        def layer(inputs, outputs, size, stride):
            conv = nn.Conv3d(inputs, outputs, size, stride, padding=tuple(side // 2 for side in size))
            return conv, nn.BatchNorm3d(outputs), nn.ReLU()

        self.features = nn.Sequential(
            *layer(1, 8, (1, 5, 5), (1, 2, 2)),  # (B, 8, 8, 14, 14)
            *layer(8, 16, (3, 3, 3), (1, 2, 2)),  # (B, 16, 8, 7, 7)
            *layer(16, 32, (3, 3, 3), (2, 1, 1)),  # (B, 32, 4, 7, 7)
            *(nn.Flatten(), nn.Linear(32 * 4 * 7 * 7, WIDTH), nn.BatchNorm1d(WIDTH, affine=False)),
        )
        self.digit, self.steps = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, 2 * (CLIP - 1))

    def forward(self, clips):
        """Scores of the digits (B, 10), and the rows and columns of the seven steps (B, 7, 2) in pixels."""
        features = self.features(clips)  # (B, WIDTH), each with standard deviation 1 over the clips of the training
        return self.digit(features), self.steps(features).unflatten(1, (-1, 2))


def train_clip_net(data, *, clips=4500, held_out=500, updates=350, batch_size=64, seed=0):
    """Train a `ClipNet` on real clips; a quarter of a minute on one core.

    In half of the clips each frame may be replaced by one of its neighbours. Otherwise the network would tell all steps
    from their mean, and clips that jitter would have the features of real ones.

    Args:
        data: `MovingDigits(frames=8)`, with `begin` so large that the clips come from all over the paths.
        clips: clips to train on, each of another image.
        held_out: clips of yet other images, to judge the network.
        updates: steps of gradient descent.

    Returns:
        the network in eval mode, and what it reaches on the held-out clips: {"digit": share of the digits it tells,
        "step_error": mean distance from a step it tells to the true one, in pixels, "step": mean length of a step}.
    """
    generator = seeded_generator(seed)
    images = torch.randperm(data.images_shown, generator=generator)[: clips + held_out]
    indices = (images + data.images_shown * torch.randint(data.paths, images.shape, generator=generator)).tolist()
    videos, digits = (torch.stack(parts) for parts in zip(*(data[index] for index in indices)))
    paths = torch.stack([data.path(index) for index in indices])  # (N, 8, 2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = ClipNet().to(memory_format=torch.channels_last_3d)  # a third faster on a CPU
        optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=updates)
        for _ in tqdm(range(updates), desc="clip net", unit="step"):
            batch = torch.randint(len(videos) - held_out, (batch_size, 1))
            exchanged = torch.randint(-1, 2, (batch_size, CLIP)) * (torch.rand(batch_size, 1) < 0.5)
            times = (torch.arange(CLIP) + exchanged).clamp(0, CLIP - 1)
            scores, told = net(videos[batch, :, times].transpose(1, 2))
            loss = F.cross_entropy(scores, digits[batch[:, 0]])
            loss = loss + 4 * F.mse_loss(told, paths[batch, times].diff(dim=1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    net.eval()
    steps = paths[-held_out:].diff(dim=1)
    with torch.no_grad():
        scores, told = net(videos[-held_out:])
    return net, {
        "digit": (scores.argmax(1) == digits[-held_out:]).float().mean().item(),
        "step_error": (told - steps).norm(dim=2).mean().item(),
        "step": steps.norm(dim=2).mean().item(),
    }


def train_judges(length, seed=0):
    """Train what judges streams of `length` frames: the classifier of single frames, and the network of clips.

    Returns:
        the classifier, the `ClipNet`, and what they reach on real frames and clips they were not trained on, as a dict.
    """
    still = MovingDigits(frames=1, seed=seed, begin=length - 1)
    frames, labels = zip(*(still[index] for index in range(still.images_shown)))
    classifier, accuracy = train_classifier(torch.cat(frames, dim=1).transpose(0, 1), torch.stack(labels), seed=seed)
    moving = MovingDigits(frames=CLIP, seed=seed, begin=max(0, length - CLIP))
    clip_net, reached = train_clip_net(moving, seed=seed)
    return classifier, clip_net, {"classifier_accuracy_on_real_frames": accuracy, "clip_net_on_real_clips": reached}


def frechet(first, second):
    """The Fréchet distance of the normal distributions with the mean and covariance of two sets of features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), computed in float64 (Dowson and Landau 1982; of videos: Unterthiner et
    al., arXiv 1812.01717).

    Args:
        first, second: (N, F) and (M, F).

    Raises:
        ValueError: fewer than two samples, or not the same features.
    """
    if first.dim() != 2 or first.shape[1:] != second.shape[1:] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"first, second: expected at least two rows of the same features, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    means, covariances = zip(*((x.mean(0), x.T.cov()) for x in (first.double(), second.double())))
    roots = []
    for covariance in covariances:
        values, vectors = torch.linalg.eigh(covariance)
        roots.append(vectors * values.clamp_min(0).sqrt() @ vectors.T)
    common = torch.linalg.matrix_norm(roots[0] @ roots[1], "nuc")  # the trace of (C1 C2)^(1/2)
    distance = (means[0] - means[1]).square().sum() + sum(c.trace() for c in covariances) - 2 * common
    return distance.clamp_min(0).item()


@torch.no_grad()
def clip_features(net, video):
    """(N, WIDTH): the features of all clips of 8 frames that a video divides into."""
    clips = video.unfold(2, CLIP, CLIP).permute(0, 2, 1, 5, 3, 4).flatten(0, 1)  # (N, 1, 8, H, W)
    return torch.cat([net.features(part) for part in clips.split(256)])


@torch.no_grad()
def read_as(video, labels, classifier):
    """(B, T) bool: whether the classifier reads each frame as the label of its video."""
    scores = torch.cat([classifier(frames) for frames in video.transpose(1, 2).flatten(0, 1).split(1024)])
    return scores.argmax(1).view(len(video), -1) == labels[:, None]


def real_videos(data, labels, seed=0):
    """(B, 1, T, H, W): videos of `MovingDigits`, one for each label, of a random image and path."""
    generator = seeded_generator(seed)
    clips = []
    for label in labels.tolist():
        images = (data.labels == label).nonzero().squeeze(1)
        image = images[torch.randint(len(images), (), generator=generator)].item()
        path = torch.randint(data.paths, (), generator=generator).item()
        clips.append(data[image + data.images_shown * path][0])
    return torch.stack(clips)


def by_length(video, labels, classifier, clip_net, real, spans=SPANS):
    """How good a stream of moving digits is in its first frames and later on, beside real videos.

    Args:
        video: (B, 1, T, 28, 28).
        labels: (B,) digits that were asked for.
        classifier: (N, 1, 28, 28) images to (N, 10) scores, see `train_classifier`.
        clip_net: a trained `ClipNet`.
        real: (2 B, 1, T' >= T, 28, 28), real videos of the same digits twice (`real_videos`).
        spans: first frame and end of each span, at least 8 frames apart; those that end after the video are left out.

    Returns:
        a dict for each span: "frames": [first, end]; "read": share of the frames that are read as asked; "speed",
        "acceleration", "cosine" and "mass" (`motion`), each also of the real videos, as "speed_real" and so on;
        "frechet": the distance of the clips of 8 frames from those of half the real videos, and "frechet_real": that
        of the other half, which is as large as the video, so that a stream as good as real reaches it.

    Raises:
        ValueError: real videos that are not twice as many or shorter, or not one label for each video.
    """
    count, length = len(video), video.shape[2]
    if labels.shape != (count,):
        raise ValueError(f"labels: expected one for each of {count} videos, got {tuple(labels.shape)}")
    if len(real) != 2 * count or real.shape[2] < length:
        raise ValueError(
            f"real: expected {2 * count} videos of at least {length} frames, got {len(real)} of {real.shape[2]}"
        )
    rows = []
    read = read_as(video, labels, classifier).float()
    for first, end in spans:
        if end > length:
            continue
        drawn, others, reference = (part[:, :, first:end] for part in (video, *real.split(count)))
        moves, moves_real = motion(drawn), motion(real[:, :, first:end])
        features = clip_features(clip_net, reference)
        row = {"read": read[:, first:end].mean().item()}
        for name in moves:
            row |= {name: moves[name], f"{name}_real": moves_real[name]}
        row["frechet"] = frechet(clip_features(clip_net, drawn), features)
        row["frechet_real"] = frechet(clip_features(clip_net, others), features)
        rows.append({"frames": [first, end], **{name: round(value, 4) for name, value in row.items()}})
    return rows
