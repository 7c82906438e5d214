"""VideoDiT: diffusion transformer on video, trained in parallel over frames and sampled frame by frame.

Tokens are (B, T', S, D): T' frames of S = height * width patches. "Frame" is a frame of tokens, patch[0] video frames.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.blocks import AdaLN, VideoBlock, initialize, make_frame_mixer, make_text_mixer
from ..layers.embeddings import (
    SMOOTH,
    TimeEmbedding,
    patchify_video,
    sincos_positions,
    sincos_positions_3d,
    unpatchify_video,
)
from ..layers.layout import FULL_CONTEXT, ContextWindow, FrameLayout, Grid
from ..layers.local_conv import FrameConv
from ..ops.checks import under_autocast
from .cache import StreamCache
from .checks import check_at_least, check_blocks, check_dtype, check_integers, check_labels, check_placed
from .config import SIZES, VideoDiTConfig


class VideoDiT(nn.Module):
    """Video diffusion transformer conditioned on time and text or class (davidpicard/HoMM, TextVideoDiH).

    Args:
        in_channels: channels C of the videos or latents.
        size: (H, W) of the training videos. Any other multiple of the patch works at run time.
        length: video frames of a clip in training; with positions="sincos" no clip or stream is longer.
        text_dim: width of the text embeddings; 0 for a model without text.
        n_classes: number of classes or actions, label `n_classes` means "none"; 0 for a model without.
        patch: (t, h, w), the part of the video that makes one token.
        dim: width of the tokens, a multiple of 8.
        n_layers: number of blocks.
        n_heads: heads of attention, and gates per token of the power form (1: a gate per channel).
        mixer: "product", "power" or "attention", for text and frames alike; "attention+power" or "attention+product":
            softmax inside each frame and a polynomial state across frames; or a sequence with one of them per layer.
        degree, expand: of the polynomial mixers; degree None takes 2 for product, 3 for power.
        ffw_expand: width of the feed-forward layers, in multiples of dim.
        local_conv: depthwise 3x3 convolution of a frame and 0, 1 or 2 frames before it (`FrameConv`): the number, or
            "frame" for 0 and "clip" for 2, or None; or a sequence with one of them per layer. True is "clip".
        positions: "sincos", of time, row and column; "space", of row and column only: the model knows time from the
            local convolution, and a stream has no end; "rotary": as "space", and the power layers rotate their features
            by 3-D positions (at least 6 heads, or one).
        read: how polynomial mixers read earlier frames: "shared", one mean over them and the frame itself, or "split",
            each by a gate of its own (`PoM`).
        fade: with read="split", how the past fades with every frame: None, not; "head", by a learned factor for every
            gate; "gated", by factors computed from the finished frame.
        sink: with read="split", number of first frames that never fade and are read by a gate of their own.
        space_groups: with read="split", side of blocks of patches: a token also reads the past of its own block, by a
            gate of its own. 1: none. It divides the patches of a frame in height and width.
        two_times: the model also takes a duration, `span`, and predicts the mean velocity over it
            (`diffusion.MeanFlow`). At initialisation it equals the model without.
        time_frequency: highest frequency of the embedding of time, in radians per unit of time; None takes 1, and with
            two_times 0.02, so that derivatives by time are small.

    `config` holds these arguments as plain JSON values: `VideoDiT(**model.config)` builds the same model.

    Raises:
        ValueError: an argument is out of range, or two of them contradict each other.
    """

    @functools.wraps(VideoDiTConfig.__init__, assigned=())  # for help() and inspect.signature
    def __init__(self, *args: Any, **options: Any):
        super().__init__()
        config = VideoDiTConfig(*args, **options)
        self.config = config.to_dict()
        self.in_channels, self.length, self.positions = config.in_channels, config.length, config.positions
        (height, width), (t, h, w) = config.size, config.patch
        self.size, self.patch = (height, width), (t, h, w)
        self.text_dim, self.n_classes = text_dim, n_classes = config.text_dim, config.n_classes
        self.dim = dim = config.dim

        self.patch_in = nn.Linear(t * h * w * config.in_channels, dim)
        self.time_embed = TimeEmbedding(dim, config.fastest)
        self.span_embed = TimeEmbedding(dim, SMOOTH) if config.two_times else None
        self.text_embed = nn.Linear(text_dim, dim) if text_dim else None
        self.label_embed = nn.Embedding(n_classes + 1, dim) if n_classes else None
        self.blocks = nn.ModuleList()
        polynomial: dict[str, Any] = {"degree": config.degree, "expand": config.expand}
        memory = {name: getattr(config, name) for name in ("read", "fade", "sink", "space_groups")}
        memory["rope"] = "3d" if config.positions == "rotary" else None
        self.sink = config.sink
        for kind, earlier in zip(config.mixers, config.conv_frames, strict=True):
            mixer = make_frame_mixer(kind, dim, config.n_heads, **memory, **polynomial)
            cross_mixer = make_text_mixer(kind, dim, config.n_heads, **polynomial) if text_dim else None
            local_conv = None if earlier is None else FrameConv(dim, earlier)
            self.blocks.append(VideoBlock(dim, mixer, config.ffw_expand, local_conv, cross_mixer))
        self.norm_out = AdaLN(dim)
        self.patch_out = nn.Linear(dim, t * h * w * config.in_channels)

        initialize(self)
        nn.init.zeros_(self.patch_out.weight)  # the untrained model predicts 0
        if self.span_embed is not None:
            nn.init.zeros_(self.span_embed.mlp[-1].get_parameter("weight"))
        if self.text_embed is not None:
            nn.init.normal_(self.text_embed.weight, std=0.02)

    @property
    def reference_parameter(self) -> nn.Parameter:
        """A parameter that tells dtype and device. (The weight of a quantised layer is not a parameter.)"""
        return next(self.parameters())

    def start(
        self, batch: int = 1, size: tuple[int, int] | None = None, *, window: int = 0, decay: float = 1.0
    ) -> StreamCache:
        """The cache before the first frame of a stream, for `forward(past=...)`.

        Args:
            batch: number of videos.
            size: (H, W) of the videos, multiples of the patch; None takes that of the training videos.
            window: a frame sees itself and the `window` - 1 frames of tokens before it; 0: all. The local convolution
                sees its earlier frames and the mixer its sink, whatever the window. Not for a model that fades.
            decay: factor above 0 and at most 1 by which earlier frames count less with every new frame. For polynomial
                mixers only.

        Raises:
            ValueError: an argument is out of range, or decay is combined with a window or with attention.
        """
        check_at_least({"batch": batch, "window": window}, {"batch": 1, "window": 0})
        height, width = self.size if size is None else check_integers("size", size, 2)
        if height % self.patch[1] or width % self.patch[2]:
            raise ValueError(f"size: expected multiples of the patch {self.patch[1:]}, got {height} x {width}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay: expected a number above 0 and at most 1, got {decay}")
        if window and self.config["fade"]:
            raise ValueError(f"window: expected 0, got {window}; this model was trained with a past that fades")
        if decay != 1 and (window or "attention" in VideoDiTConfig(**self.config).mixers):
            raise ValueError("decay: it goes without a window, and fades the sums of polynomial mixers, not attention")
        grid = Grid(height // self.patch[1], width // self.patch[2])
        check_blocks(self.config["space_groups"], grid.height, grid.width)
        return self._new_cache(batch, grid, 0, ContextWindow(window, decay), self.reference_parameter.device)

    def _new_cache(
        self, batch: int, grid: Grid, frames: int, context_window: ContextWindow, device: torch.device | str
    ) -> StreamCache:
        """A cache of `frames` frames, with zeros in every tensor."""
        weight, patches = self.reference_parameter, grid.height * grid.width
        layout = FrameLayout(grid, causal=True, context_window=context_window)
        cached = min(frames, context_window.window - 1) if context_window.window else frames
        blocks: list[Any] = list(self.blocks)
        tokens = cached * patches
        mixer_caches = (b.mixer.new_cache(batch, tokens, layout, weight.dtype, device) for b in blocks)
        convs = (block.local_conv for block in blocks)
        conv_caches = (None if conv is None else conv.new_cache(batch, patches, weight.dtype, device) for conv in convs)
        return StreamCache(frames, grid.height, grid.width, tuple(mixer_caches), tuple(conv_caches), context_window)

    def forward(
        self,
        video: Tensor,
        time: Tensor,
        text: Tensor | None = None,
        labels: Tensor | None = None,
        span: Tensor | None = None,
        *,
        text_weight: Tensor | None = None,
        frame_causal: bool = False,
        finished: Tensor | None = None,
        finished_time: Tensor | None = None,
        past: StreamCache | None = None,
        return_past: bool = False,
    ) -> Tensor | tuple[Tensor, StreamCache]:
        """Predict noise, velocity or whatever the model is trained for.

        T' = T / patch[0] is the number of frames of tokens. Frames may come in chunks of any length, each with the
        cache that the previous call returned: the result is that of one frame-causal call with all frames.

        Args:
            video: (B, C, T, H, W), noisy; T, H and W any multiples of the patch.
            time: (B,), or (B, T') with one for every frame; diffusion time in [0, 1000].
            text: (B, L, text_dim), for a model with text.
            labels: (B,) or (B, T') integers in 0..n_classes, for a model with classes; n_classes means "none". Their
                range is checked on the CPU only.
            span: (B,), or (B, T') with one for every frame; duration before `time` over which to predict the mean
                velocity, 0 to `time`; for a model with two times. None is 0, as for finished frames.
            text_weight: (B, L) weight of every text token, at least 0; all 0 is an empty text. None weighs all 1.
            frame_causal: a token sees its own frame and earlier ones, instead of all.
            finished: (B, C, T, H, W), the same frames without noise, for teacher forcing; needs frame_causal. A token
                of `video` then sees the earlier frames in `finished`, and its own frame in `video`. The result is that
                of one call for each frame, with the cache of the clean frames before it. The cost is twice that of
                `video` alone, linear in frames (except attention).
            finished_time: (B,) or (B, T'), the time of the clean frames; None: 0.
            past: the cache of the frames before these; needs frame_causal.
            return_past: also return the cache after these frames, the clean ones if given; needs frame_causal.

        Returns:
            (B, C, T, H, W), and with return_past the `StreamCache`.

        Raises:
            TypeError, ValueError: an argument has a wrong type, shape, device or range.
        """
        self._check_inputs(video, time, text, labels, text_weight, span)
        teacher_forced = finished is not None
        if finished_time is not None and not teacher_forced:
            raise ValueError("finished_time: expected None where no finished frames are given")
        t, h, w = self.patch
        grid, frames = Grid(video.shape[3] // h, video.shape[4] // w), video.shape[2] // t
        check_blocks(self.config["space_groups"], grid.height, grid.width)
        if not frame_causal and (past is not None or return_past):
            raise ValueError("frame_causal: expected True with past or return_past, since what is past stays as it is")
        if past is not None:
            self.check_cache(past, video.shape[0], grid.height, grid.width)
        first = 0 if past is None else past.frames
        if span is None and self.span_embed is not None:
            span = torch.zeros_like(time)
        if finished is not None:
            finished_time = torch.zeros_like(time) if finished_time is None else finished_time
            self._check_finished(finished, finished_time, video, frame_causal)
            if finished_time.dim() != time.dim():
                time, finished_time = (
                    t if t.dim() == 2 else t[:, None].expand(-1, frames) for t in (time, finished_time)
                )
            video, time = torch.cat([finished, video]), torch.cat([finished_time, time])
            span = None if span is None else torch.cat([torch.zeros_like(span), span])
            text, labels, text_weight = (
                None if tensor is None else torch.cat([tensor, tensor]) for tensor in (text, labels, text_weight)
            )

        x = self.patch_in(patchify_video(video, self.patch))  # (B, T', S, D); with teacher forcing B is doubled
        x = x + self._position_embedding(first, frames, grid)  # (B, T', S, D)
        cond = self._per_frame(self.time_embed(time, self.reference_parameter), time)  # (B, 1 or T', 1, D)
        if span is not None and self.span_embed is not None:
            cond = cond + self._per_frame(self.span_embed(span, self.reference_parameter), span)
        if labels is not None and self.label_embed is not None:
            cond = cond + self._per_frame(self.label_embed(labels), labels)  # (B, 1 or T', 1, D)
        cond = F.silu(cond)
        if text is not None and self.text_embed is not None:
            text = self.text_embed(text).to(x.dtype)  # (B, L, D)
        coordinates = grid.coordinates(first, frames, x.device) if self.positions == "rotary" else None
        context_window = FULL_CONTEXT if past is None else past.context_window
        layout = FrameLayout(grid, frame_causal, teacher_forced, context_window, coordinates, return_past)

        mixer_caches, conv_caches = [], []
        for layer, block in enumerate(self.blocks):
            mixer_cache = None if past is None else past.mixer_caches[layer]
            conv_cache = past.conv_caches[layer] if past is not None and past.conv_caches else None
            x, mixer_cache, conv_cache = block(x, cond, layout, text, text_weight, mixer_cache, conv_cache)
            if return_past:
                mixer_caches.append(mixer_cache)
                # Cloned: a view would keep all frames in memory.
                conv_caches.append(None if conv_cache is None else conv_cache.clone())
        if teacher_forced:
            x, cond = x.chunk(2)[1], cond.chunk(2)[1]
        out = unpatchify_video(self.patch_out(self.norm_out(x, cond)), grid, self.patch)  # (B, C, T, H, W)
        if not return_past:
            return out
        caches = tuple(mixer_caches), tuple(conv_caches)
        return out, StreamCache(first + frames, grid.height, grid.width, *caches, context_window)

    def _position_embedding(self, first: int, frames: int, grid: Grid) -> Tensor:  # -> (1, 1 or T', S, D)
        weight = self.reference_parameter
        if self.positions != "sincos":
            return sincos_positions(grid, self.dim, like=weight)[None]
        length = self.length // self.patch[0]
        if first + frames > length:
            raise ValueError(
                f"video: positions='sincos' end at length={self.length}, {length} frames of tokens, got frames {first} "
                f"to {first + frames - 1}; a model with positions='space' or 'rotary' has no end"
            )
        return sincos_positions_3d(first, frames, length, grid, self.dim, like=weight)

    @staticmethod
    def _per_frame(embedding: Tensor, marks: Tensor) -> Tensor:
        """Embeddings of times or labels `marks`, (B,) or (B, T') -> (B, 1 or T', 1, D)."""
        return (embedding[:, None] if marks.dim() == 1 else embedding)[:, :, None]

    def _check_inputs(
        self,
        video: Tensor,
        time: Tensor,
        text: Tensor | None,
        labels: Tensor | None,
        text_weight: Tensor | None,
        span: Tensor | None,
    ) -> None:
        weight = self.reference_parameter
        for name, tensor, argument in (("text", text, "text_dim"), ("labels", labels, "n_classes")):
            size = self.config[argument]
            if tensor is None and size:
                raise TypeError(f"{name}: this model was built with {argument}={size} and needs them, got None")
            if tensor is not None and not size:
                raise TypeError(f"{name}: this model was built without, {argument}=0; leave them out")
        if text_weight is not None and text is None:
            raise TypeError("text_weight: expected None where there is no text")
        check_placed(weight, video=video, time=time, text=text, labels=labels, text_weight=text_weight, span=span)
        if span is not None and self.span_embed is None:
            raise ValueError("span: expected None, for this model has one time; build it with two_times=True")
        if video.dim() != 5 or video.shape[1] != self.in_channels:
            raise ValueError(f"video: expected shape (B, {self.in_channels}, T, H, W), got {tuple(video.shape)}")
        check_dtype(weight, video=video, text=text)
        if any(not size or size % unit for size, unit in zip(video.shape[2:], self.patch, strict=True)):
            raise ValueError(
                f"video: expected frames, height and width to be multiples of the patch {self.patch}, "
                f"got {' x '.join(map(str, video.shape[2:]))}; pad or resize them"
            )
        self._check_marks(video, time=time, labels=labels, span=span)
        if text is not None and (text.dim() != 3 or text.shape[::2] != (video.shape[0], self.text_dim)):
            raise ValueError(f"text: expected shape ({len(video)}, L, {self.text_dim}), got {tuple(text.shape)}")
        if text is not None and text_weight is not None and text_weight.shape != text.shape[:2]:
            raise ValueError(f"text_weight: expected shape {tuple(text.shape[:2])}, got {tuple(text_weight.shape)}")
        if labels is not None:
            check_labels(labels, self.n_classes)

    def _check_marks(self, video: Tensor, **marks: Tensor | None) -> None:
        """ValueError unless all marks, times, spans or labels, are (B,) or (B, T')."""
        one, many = (video.shape[0],), (video.shape[0], video.shape[2] // self.patch[0])
        for name, tensor in marks.items():
            if tensor is not None and tensor.shape not in (one, many):
                raise ValueError(
                    f"{name}: expected shape {one}, one per video, or {many}, one per frame of tokens, "
                    f"got {tuple(tensor.shape)}"
                )

    def _check_finished(self, finished: Tensor, finished_time: Tensor, video: Tensor, frame_causal: bool) -> None:
        if not frame_causal:
            raise ValueError("frame_causal: expected True with finished frames, which later ones must not change")
        check_placed(self.reference_parameter, finished=finished, finished_time=finished_time)
        self._check_marks(video, finished_time=finished_time)
        if finished.shape != video.shape or finished.dtype != video.dtype:
            raise ValueError(
                f"finished: expected {tuple(video.shape)} in {video.dtype} as the video, got "
                f"{tuple(finished.shape)} in {finished.dtype}"
            )

    def check_cache(self, past: StreamCache, batch: int, height: int, width: int) -> None:
        """TypeError or ValueError unless `past` comes from this model, with this batch and height x width patches."""
        if not isinstance(past, StreamCache):
            raise TypeError(f"past: expected a StreamCache, got {type(past).__name__}")
        layers, cached = len(self.blocks), len(past.mixer_caches)
        if cached != layers:
            raise ValueError(f"past: expected one of {layers} layers as the model, got {cached}")
        if (past.height, past.width) != (height, width):
            raise ValueError(
                f"past: its frames have {past.height} x {past.width} patches, the video {height} x {width}"
            )
        weight = self.reference_parameter
        expected = self._new_cache(batch, Grid(height, width), past.frames, past.context_window, "meta").state_dict()
        tensors = past.state_dict()
        exact = not under_autocast(weight)
        for name in [name for name in {**expected, **tensors} if name not in ("seen", "forgetting")]:
            a, b = expected.get(name), tensors.get(name)
            if a is None or b is None or a.shape != b.shape or (exact and a.dtype != b.dtype):
                a, b = ("none" if t is None else f"{tuple(t.shape)} in {t.dtype}" for t in (a, b))
                raise ValueError(f"past: {name!r}: expected {a}, got {b}; it is of another model, batch or precision")
            if b.device != weight.device:
                raise ValueError(f"past: expected on {weight.device} as the model, got {b.device}; move it with .to()")


VIDEO_DITS = {f"{name}/{p}": {**size, "patch": (2, p, p)} for name, size in SIZES.items() for p in (2, 4, 8)}


def video_dit(name: str, **options: Any) -> VideoDiT:
    """The `VideoDiT` of a standard size, "S/2" to "XL/8": size / side of the patch, which is two video frames long.

    The authors' S/2 and XL/2 have mixer="product" and local_conv=False, S/2 with ffw_expand=3, XL/2 with n_layers=20
    and ffw_expand=2.

    Args:
        name: one of `VIDEO_DITS`.
        options: arguments of `VideoDiT`; they override those of the size.

    Raises:
        ValueError: an unknown name, or arguments that `VideoDiT` refuses.
    """
    if name not in VIDEO_DITS:
        raise ValueError(f"name: expected one of {', '.join(VIDEO_DITS)}, got {name!r}")
    return VideoDiT(**{**VIDEO_DITS[name], **options})
