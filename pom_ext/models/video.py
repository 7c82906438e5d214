"""VideoDiT: diffusion transformer on video, trained in parallel over frames and sampled frame after frame.

Tokens are (B, T, S, D): T frames of S = height x width patches. "Frame" is a frame of tokens, patch[0] video frames.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.checks import under_autocast
from . import blocks
from .blocks import AdaLN, Grid, TimeEmbedding, polynomial
from .cache import FORGET_NOTHING, Forgetting, Past
from .image import SIZES
from .video_blocks import (
    KERNEL,
    CrossAttention,
    FrameAttention,
    FrameConv,
    FrameMixer,
    Layout,
    VideoBlock,
    coordinates_3d,
    patchify_video,
    sincos_positions_3d,
    unpatchify_video,
)

MIXERS = ("product", "power", "attention")
POSITIONS = ("sincos", "space", "rotary")


def _integers(name, value, count):
    """`value` as a list, or ValueError unless it holds `count` positive integers."""
    given = value if isinstance(value, (tuple, list)) else ()
    if len(given) != count or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError(f"{name}: expected {count} positive integers, got {value}")
    return list(value)


def _check_config(config):
    """Raise ValueError for arguments that make no model."""
    least = {"in_channels": 1, "length": 1, "text_dim": 0, "n_classes": 0, "dim": 8, "n_layers": 1, "n_heads": 1,
             "ffw_expand": 1}  # fmt: skip
    blocks.check_least(config, least)
    patch, size, mixer = config["patch"], config["size"], config["mixer"]
    for name, given, unit in zip(("length", "size", "size"), (config["length"], *size), patch):
        if given % unit:
            raise ValueError(f"{name}: expected a multiple of the patch (t, h, w) = {tuple(patch)}, got {config[name]}")
    if config["dim"] % 8:
        raise ValueError(f"dim: expected a multiple of 8 (sine and cosine of three axes), got {config['dim']}")
    kinds = blocks.check_mixers(config, MIXERS)
    if config["positions"] not in POSITIONS:
        raise ValueError(f"positions: expected one of {', '.join(POSITIONS)}, got {config['positions']!r}")
    if config["positions"] == "rotary" and "power" not in kinds:
        raise ValueError(f"positions: 'rotary' turns the features of mixer='power', and there is none in {mixer!r}")


class VideoDiT(nn.Module):
    """Video diffusion transformer conditioned on time and text or class (davidpicard/HoMM, TextVideoDiH).

    Args:
        in_channels: channels C of the videos or latents.
        size: (H, W) that the model is trained at. Any other multiple of the patch works at run time.
        length: video frames of a clip in training; with positions="sincos" no clip or stream is longer.
        text_dim: width of the text embeddings; 0 for a model without text.
        n_classes: number of classes or actions, label `n_classes` means "none"; 0 for a model without.
        patch: (t, h, w), the part of the video that makes one token.
        dim: width of the tokens, a multiple of 8.
        n_layers: number of blocks.
        n_heads: heads of attention, and gates per token of the power form (1: a gate per channel).
        mixer: "product", "power" or "attention", or a sequence with one of them per layer; of text and frames alike.
        degree, expand: of the polynomial mixers; degree None takes 2 for product, 3 for power.
        ffw_expand: width of the feed-forward layers, in multiples of dim.
        local_conv: depthwise 3x3x3 convolution, causal in time, in every block (`FrameConv`).
        positions: "sincos", of time, row and column; "space", of row and column alone: time is told by the local
            convolution, and a stream has no end; "rotary": as "space", and the power layers turn their features by
            3-D positions (at least 6 heads, or one).

    `config` holds these arguments as plain JSON values: `VideoDiT(**model.config)` builds the same model.

    Raises:
        ValueError: an argument outside what is said above.
    """

    def __init__(self, in_channels=16, size=(32, 32), length=16, *, text_dim=0, n_classes=0, patch=(2, 2, 2), dim=384,
                 n_layers=12, n_heads=6, mixer="power", degree=None, expand=2, ffw_expand=4, local_conv=True,
                 positions="sincos"):  # fmt: skip
        super().__init__()
        self.config = {
            "in_channels": in_channels, "size": _integers("size", size, 2), "length": length, "text_dim": text_dim,
            "n_classes": n_classes, "patch": _integers("patch", patch, 3), "dim": dim, "n_layers": n_layers,
            "n_heads": n_heads, "mixer": mixer if isinstance(mixer, str) else list(mixer), "degree": degree, "expand": expand,
            "ffw_expand": ffw_expand, "local_conv": local_conv, "positions": positions,
        }  # fmt: skip
        _check_config(self.config)
        self.in_channels, self.size, self.length, self.patch = in_channels, tuple(size), length, tuple(patch)
        self.text_dim, self.n_classes, self.dim, self.positions = text_dim, n_classes, dim, positions

        self.patch_in = nn.Linear(math.prod(patch) * in_channels, dim)
        self.time_embed = TimeEmbedding(dim)
        self.text_embed = nn.Linear(text_dim, dim) if text_dim else None
        self.label_embed = nn.Embedding(n_classes + 1, dim) if n_classes else None
        self.blocks = nn.ModuleList()
        for kind in [mixer] * n_layers if isinstance(mixer, str) else mixer:
            if kind == "attention":
                frames, cross = FrameAttention(dim, n_heads), CrossAttention(dim, n_heads) if text_dim else None
            else:
                rope = "3d" if positions == "rotary" and kind == "power" else None
                frames = polynomial(kind, dim, n_heads, degree, expand, rope=rope, layer=FrameMixer)
                cross = polynomial(kind, dim, n_heads, degree, expand) if text_dim else None
            self.blocks.append(VideoBlock(dim, frames, ffw_expand, FrameConv(dim) if local_conv else None, cross))
        self.norm_out = AdaLN(dim)
        self.patch_out = nn.Linear(dim, math.prod(patch) * in_channels)

        blocks.initialize(self)
        nn.init.zeros_(self.patch_out.weight)  # the untrained model predicts 0
        if text_dim:
            nn.init.normal_(self.text_embed.weight, std=0.02)

    @property
    def like(self):
        """A parameter, for its dtype and device. (Of a quantised layer the weight is none.)"""
        return next(self.parameters())

    def start(self, batch=1, size=None, *, window=0, decay=1.0):
        """The `Past` before the first frame of a stream, for `forward(past=...)`.

        Args:
            batch: videos.
            size: (H, W) of the videos, multiples of the patch; None takes those of the training.
            window: a frame sees itself and the `window` - 1 frames of tokens before it; 0: all. The local convolution
                reaches two frames back in every layer, whatever the window.
            decay: above 0, at most 1: with every frame, what came before counts this factor less. Polynomial mixers only.

        Raises:
            ValueError: an argument outside what is said above.
        """
        blocks.check_least({"batch": batch, "window": window}, {"batch": 1, "window": 0})
        height, width = self.size if size is None else _integers("size", size, 2)
        if height % self.patch[1] or width % self.patch[2]:
            raise ValueError(f"size: expected multiples of the patch {self.patch[1:]}, got {height} x {width}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay: expected a number above 0 and at most 1, got {decay}")
        if decay != 1 and (window or "attention" in self.config["mixer"]):
            raise ValueError("decay: it goes without a window, and fades the sums of polynomial mixers, not attention")
        grid = Grid(height // self.patch[1], width // self.patch[2])
        return self._empty_past(batch, grid, 0, Forgetting(window, decay), self.like.device)

    def _empty_past(self, batch, grid, frames, forgetting, device):
        """A past of so many frames, all of them zero."""
        patches = grid.height * grid.width
        held = min(frames, forgetting.window - 1) if forgetting.window else frames
        memories = tuple(
            block.mixer.empty_memory(batch, held * patches, forgetting, self.like.dtype, device)
            for block in self.blocks
        )
        tail = self.like.new_zeros(batch, KERNEL - 1, patches, self.dim, device=device)
        tails = tuple(tail for block in self.blocks if block.local_conv is not None)
        return Past(frames, grid.height, grid.width, memories, tails, forgetting)

    def forward(self, video, time, text=None, labels=None, *, text_weight=None, frame_causal=False, finished=None,
                finished_time=None, past=None, return_past=False):  # fmt: skip
        """Predict noise, velocity or whatever the model is trained for.

        With T' = T / patch[0] frames of tokens. Frames given one after the other, in chunks of any length and each with
        the past that the one before returned, come out as in one frame-causal call.

        Args:
            video: (B, C, T, H, W), noisy; T, H and W any multiples of the patch.
            time: (B,), or (B, T') for every frame its own, diffusion time in [0, 1000).
            text: (B, L, text_dim), for a model with text.
            labels: (B,) or (B, T') integers in 0..n_classes, for a model with classes; n_classes means "none". Their
                values are checked on the CPU only: reading them back from a GPU would stop it.
            text_weight: (B, L) weight of every text token, at least 0; all 0 is an empty text. None sees all.
            frame_causal: a token sees the frames up to and with its own, instead of all.
            finished: (B, C, T, H, W), the same frames without noise, for frame_causal=True. A token of `video` then sees
                the finished frames before its own, and its own frame in `video`: all frames at once come out as one by
                one with the past of the finished ones. Twice the cost, linear in frames (attention aside).
            finished_time: (B,) or (B, T'), the time of the finished frames; None: 0.
            past: `Past` of the frames before, for frame_causal=True.
            return_past: also return the `Past` after these frames, the finished ones if given; for frame_causal=True.

        Returns:
            (B, C, T, H, W), and the Past if asked for.

        Raises:
            TypeError, ValueError: an argument of another type, shape, device or range.
        """
        self._check_inputs(video, time, text, labels, text_weight)
        paired = finished is not None
        if finished_time is not None and not paired:
            raise ValueError("finished_time: expected None where no finished frames are given")
        t, h, w = self.patch
        grid, frames = Grid(video.shape[3] // h, video.shape[4] // w), video.shape[2] // t
        self._check_past(past, frame_causal, return_past, video.shape[0], grid)
        first = 0 if past is None else past.frames
        if paired:
            finished_time = torch.zeros_like(time) if finished_time is None else finished_time
            self._check_finished(finished, finished_time, video, frame_causal)
            if finished_time.dim() != time.dim():
                time, finished_time = (
                    t if t.dim() == 2 else t[:, None].expand(-1, frames) for t in (time, finished_time)
                )
            video, time = torch.cat([finished, video]), torch.cat([finished_time, time])
            text, labels, text_weight = (
                None if given is None else torch.cat([given, given]) for given in (text, labels, text_weight)
            )

        x = self.patch_in(patchify_video(video, self.patch))  # (B, T', S, D), S = height * width; 2 B where paired
        x = x + self._position_embedding(first, frames, grid)  # (B, T', S, D)
        cond = self._per_frame(self.time_embed(time, self.like), time)  # (B, 1 or T', 1, D)
        if labels is not None:
            cond = cond + self._per_frame(self.label_embed(labels), labels)  # (B, 1 or T', 1, D)
        cond = F.silu(cond)
        if text is not None:
            text = self.text_embed(text).to(x.dtype)  # (B, L, D)
        coordinates = coordinates_3d(first, frames, grid, x.device) if self.positions == "rotary" else None
        forgetting = FORGET_NOTHING if past is None else past.forgetting
        layout = Layout(grid, frame_causal, paired, forgetting, coordinates)

        memories, tails = [], []
        for layer, block in enumerate(self.blocks):
            memory = None if past is None else past.memories[layer]
            tail = past.tails[layer] if past is not None and past.tails else None
            x, memory, tail = block(x, cond, layout, text, text_weight, memory, tail)
            if return_past:
                memories.append(memory)
                if tail is not None:
                    tails.append(tail.clone())  # a view would keep all frames
        if paired:
            x, cond = x.chunk(2)[1], cond.chunk(2)[1]
        out = unpatchify_video(self.patch_out(self.norm_out(x, cond)), grid, self.patch)  # (B, C, T, H, W)
        if not return_past:
            return out
        return out, Past(first + frames, grid.height, grid.width, tuple(memories), tuple(tails), forgetting)

    def _position_embedding(self, first, frames, grid):  # -> (1, 1 or T', S, D)
        weight = self.like
        if self.positions != "sincos":
            return blocks.sincos_positions(grid, self.dim, like=weight)[None]
        length = self.length // self.patch[0]
        if first + frames > length:
            raise ValueError(
                f"video: positions='sincos' end at length={self.length}, {length} frames of tokens, got frames {first} "
                f"to {first + frames - 1}; a model with positions='space' or 'rotary' has no end"
            )
        return sincos_positions_3d(first, frames, length, grid, self.dim, like=weight)

    @staticmethod
    def _per_frame(embedding, given):
        """Embeddings of time or labels, given as (B,) or (B, T') -> (B, 1 or T', 1, D)."""
        return (embedding[:, None] if given.dim() == 1 else embedding)[:, :, None]

    def _check_inputs(self, video, time, text, labels, text_weight):
        weight = self.like
        for name, given, size in (("text", text, self.text_dim), ("labels", labels, self.n_classes)):
            argument = {"text": "text_dim", "labels": "n_classes"}[name]
            if given is None and size:
                raise TypeError(f"{name}: this model was built with {argument}={size} and needs them, got None")
            if given is not None and not size:
                raise TypeError(f"{name}: this model was built without, {argument}=0; leave them out")
        if text_weight is not None and text is None:
            raise TypeError("text_weight: expected None where there is no text")
        blocks.check_placed(weight, video=video, time=time, text=text, labels=labels, text_weight=text_weight)
        if video.dim() != 5 or video.shape[1] != self.in_channels:
            raise ValueError(f"video: expected shape (B, {self.in_channels}, T, H, W), got {tuple(video.shape)}")
        blocks.check_dtype(weight, video=video, text=text)
        if any(not size or size % unit for size, unit in zip(video.shape[2:], self.patch)):
            raise ValueError(
                f"video: expected frames, height and width to be multiples of the patch {self.patch}, "
                f"got {' x '.join(map(str, video.shape[2:]))}; pad or resize them"
            )
        self._check_marks(video, time=time, labels=labels)
        if text is not None and (text.dim() != 3 or text.shape[::2] != (video.shape[0], self.text_dim)):
            raise ValueError(f"text: expected shape ({len(video)}, L, {self.text_dim}), got {tuple(text.shape)}")
        if text_weight is not None and text_weight.shape != text.shape[:2]:
            raise ValueError(f"text_weight: expected shape {tuple(text.shape[:2])}, got {tuple(text_weight.shape)}")
        if labels is not None:
            blocks.check_labels(labels, self.n_classes)

    def _check_marks(self, video, **marks):
        one, many = (video.shape[0],), (video.shape[0], video.shape[2] // self.patch[0])
        for name, tensor in marks.items():
            if tensor is not None and tensor.shape not in (one, many):
                raise ValueError(
                    f"{name}: expected shape {one}, one per video, or {many}, one per frame of tokens, "
                    f"got {tuple(tensor.shape)}"
                )

    def _check_finished(self, finished, finished_time, video, frame_causal):
        if not frame_causal:
            raise ValueError("frame_causal: expected True with finished frames, which later ones must not change")
        blocks.check_placed(self.like, finished=finished, finished_time=finished_time)
        self._check_marks(video, finished_time=finished_time)
        if finished.shape != video.shape or finished.dtype != video.dtype:
            raise ValueError(
                f"finished: expected {tuple(video.shape)} in {video.dtype} as the video, got {tuple(finished.shape)} in "
                f"{finished.dtype}"
            )

    def _check_past(self, past, frame_causal, return_past, batch, grid):
        if not frame_causal and (past is not None or return_past):
            raise ValueError("frame_causal: expected True with past or return_past, since what is past stays as it is")
        if past is None:
            return
        if not isinstance(past, Past):
            raise TypeError(f"past: expected a Past, got {type(past).__name__}")
        if len(past.memories) != len(self.blocks):
            raise ValueError(f"past: expected one of {len(self.blocks)} layers as the model, got {len(past.memories)}")
        if (past.height, past.width) != (grid.height, grid.width):
            raise ValueError(
                f"past: its frames have {past.height} x {past.width} patches, the video {grid.height} x {grid.width}"
            )
        weight = self.like
        expected = self._empty_past(batch, grid, past.frames, past.forgetting, "meta").state_dict()
        given = past.state_dict()
        exact = not under_autocast(weight)
        for name in [name for name in {**expected, **given} if name not in ("seen", "forgetting")]:
            a, b = expected.get(name), given.get(name)
            if a is None or b is None or a.shape != b.shape or (exact and a.dtype != b.dtype):
                a, b = ("none" if t is None else f"{tuple(t.shape)} in {t.dtype}" for t in (a, b))
                raise ValueError(f"past: {name!r}: expected {a}, got {b}; it is of another model, batch or precision")
            if b.device != weight.device:
                raise ValueError(f"past: expected on {weight.device} as the model, got {b.device}; move it with .to()")


VIDEO_DITS = {f"{name}/{p}": {**size, "patch": (2, p, p)} for name, size in SIZES.items() for p in (2, 4, 8)}


def video_dit(name, **options):
    """The `VideoDiT` of a standard size, "S/2" to "XL/8": size / side of the patch, which is two video frames long.

    `options` are arguments of VideoDiT and go before those of the size. The authors' S/2 and XL/2 are, with
    mixer="product" and local_conv=False, of ffw_expand 3 and of n_layers 20 and ffw_expand 2.
    """
    if name not in VIDEO_DITS:
        raise ValueError(f"name: expected one of {', '.join(VIDEO_DITS)}, got {name!r}")
    return VideoDiT(**{**VIDEO_DITS[name], **options})
