"""Training: schedule, average, resume, and checkpoints that survive whatever happens while they are written."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from training_cases import CONFIG, Stripes, assert_same_weights, run, tiny_model

from pom_ext.models import checkpoint as checkpoint_module
from pom_ext.models.checkpoint import load_model, read_checkpoint, save_checkpoint
from pom_ext.models.image import ImageDiT
from pom_ext.training import TrainConfig, train
from pom_ext.training.trainer import ShuffledBatches, average_of, learning_rate




class Interrupted(Exception):
    pass


class InterruptedAt(Stripes):
    """A dataset that fails when image number `last` is read."""

    def __init__(self, last):
        self.left = last

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise Interrupted
        return super().__getitem__(index)


def test_training_learns_the_images(tmp_path):
    result = run(tmp_path / "model.safetensors", steps=60)
    assert len(result.losses) == 60
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])


def test_an_interrupted_run_resumes_to_the_very_same_weights(tmp_path):
    whole = run(tmp_path / "whole.safetensors", steps=11)
    path = tmp_path / "model.safetensors"
    with pytest.raises(Interrupted):
        train(tiny_model(), InterruptedAt(4 * 7), path, CONFIG, steps=11, save_every=3, progress=False)
    assert read_checkpoint(path)[1]["step"] == 6
    resumed = run(path, steps=11, resume=True)
    assert resumed.losses == whole.losses
    assert_same_weights(resumed.model, whole.model)
    for part in ("model", "ema", "optimizer"):
        expected = read_checkpoint(tmp_path / "whole.safetensors")[0][part]
        for name, tensor in read_checkpoint(path)[0][part].items():
            assert torch.equal(tensor, expected[name]), f"{part} {name}"


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    path = tmp_path / "model.safetensors"
    first = run(path)
    again = run(path, resume=True)
    assert again.losses == first.losses
    assert_same_weights(again.model, first.model)


def test_a_killed_process_leaves_a_checkpoint_to_resume_from(tmp_path):
    """SIGKILL, at whatever moment it hits, in a run that writes a checkpoint at every step."""
    path = tmp_path / "model.safetensors"
    code = f"from tests.training_cases import run; run({str(path)!r}, steps=10**6, save_every=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        while not path.exists():
            assert process.poll() is None, "training ended without a checkpoint"
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    steps = read_checkpoint(path)[1]["step"]
    assert steps >= 1
    resumed = run(path, steps=steps + 2, resume=True)
    assert len(resumed.losses) == steps + 2


def test_training_for_a_time_ends_the_schedule_with_the_time(tmp_path):
    path = tmp_path / "model.safetensors"
    result = train(tiny_model(), Stripes(), path, CONFIG, seconds=0.5, progress=False)
    assert 0.5 <= result.seconds and len(result.losses) >= 1
    assert read_checkpoint(path)[1]["step"] == len(result.losses)


def test_bfloat16_autocast_trains_float32_weights(tmp_path):
    result = run(
        tmp_path / "model.safetensors", config=TrainConfig(batch_size=4, warmup=2, lr=1e-2, bf16=True), steps=40
    )
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float32}
    assert sum(result.losses[-10:]) < sum(result.losses[:10])
    assert result.losses != run(tmp_path / "other.safetensors", steps=40).losses


def test_noise_prediction_trains(tmp_path):
    result = run(tmp_path / "model.safetensors", config=TrainConfig("noise", batch_size=4, warmup=2, lr=1e-2), steps=60)
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])


def test_learning_rate_warms_up_and_ends_at_zero():
    config = TrainConfig(lr=1.0, warmup=3)
    assert [learning_rate(config, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(config, 100, 0.5) == pytest.approx(0.5)
    assert learning_rate(config, 100, 1.0) == learning_rate(config, 100, 1.2) == 0


def test_average_follows_its_rule():
    model = torch.nn.Linear(1, 1)
    average, expected = average_of(model, 0.5), None
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(float(step) ** 2)
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = 0.0 if step == 0 else decay * expected + (1 - decay) * step**2
        assert average.module.weight.item() == pytest.approx(expected)


def test_batches_shuffle_every_epoch_and_can_start_anywhere():
    def take(n, **options):
        batches = iter(ShuffledBatches(10, 3, seed=1, **options))
        return [next(batches) for _ in range(n)]

    batches = take(9)
    for epoch in range(3):
        seen = [index for batch in batches[3 * epoch : 3 * epoch + 3] for index in batch]
        assert len(set(seen)) == 9 and set(seen) <= set(range(10))
    assert batches[:3] != batches[3:6]
    assert take(4, start=5) == batches[5:9]
    assert take(4, start=1, stride=2) == batches[1::2], "one process of two"
    assert sorted(next(iter(ShuffledBatches(2, 32, seed=0)))) == [0, 1], "fewer images than a batch holds"


def test_load_model_gives_the_average_ready_to_sample(tmp_path):
    path = tmp_path / "model.safetensors"
    result = run(path)
    model, settings = load_model(path)
    assert_same_weights(model, result.model)
    assert not model.training
    assert settings["data"] == {"shape": [1, 8, 8], "classes": ["above", "below"]}
    last, _ = load_model(path, ema=False)
    assert not torch.equal(last.patch_out.weight, model.patch_out.weight)


def test_a_failing_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    run(path)
    before = path.read_bytes()

    def half(tensors, filename, metadata):
        filename.write_bytes(before[: len(before) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        run(path, steps=9, resume=True)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "damage", ["truncated tensors", "truncated header", "empty", "text", "huge header", "foreign safetensors"]
)
def test_a_broken_checkpoint_is_named_and_left_alone(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    run(path)
    content = path.read_bytes()
    if damage == "foreign safetensors":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes(
            {
                "truncated tensors": content[:-100],
                "truncated header": content[:40],
                "empty": b"",
                "text": b"this is no checkpoint, whatever its name says",
                "huge header": b"\xff" * 8 + content[8:],
            }[damage]
        )
    broken = path.read_bytes()
    expected = "not a checkpoint of pom_ext" if damage == "foreign safetensors" else "truncated or is not a safetensors"
    for attempt in (lambda: load_model(path), lambda: run(path, resume=True)):
        with pytest.raises(ValueError, match=f"model.safetensors is .*{expected}"):
            attempt()
    assert path.read_bytes() == broken


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*nothing.safetensors"):
        run(tmp_path / "nothing.safetensors", resume=True)


def test_resume_refuses_other_settings(tmp_path):
    path = tmp_path / "model.safetensors"
    run(path)
    with pytest.raises(ValueError, match="another train: lr is 0.01, given 0.5"):
        run(path, config=TrainConfig(batch_size=4, warmup=2, lr=0.5), resume=True)
    with pytest.raises(ValueError, match="another model: n_heads is 2, given 4"):
        train(tiny_model(n_heads=4), Stripes(), path, CONFIG, steps=6, resume=True, progress=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    run(path)
    before = path.read_bytes()
    dataset = Stripes()
    dataset.__class__ = type(
        "Broken", (Stripes,), {"__getitem__": lambda self, i: (torch.full((1, 8, 8), math.nan), torch.tensor(0))}
    )
    with pytest.raises(ArithmeticError, match="the loss is nan at step 6"):
        train(tiny_model(), dataset, path, CONFIG, steps=9, resume=True, progress=False)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "options, named",
    [
        ({}, "steps, seconds: expected one of the two"),
        ({"steps": 1, "seconds": 1.0}, "steps, seconds: expected one of the two"),
        ({"steps": 0}, "positive"),
        ({"seconds": -1.0}, "positive"),
        ({"steps": 1, "save_every": 0}, "positive"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, named):
    with pytest.raises(ValueError, match=named):
        train(tiny_model(), Stripes(), tmp_path / "model.safetensors", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_for_other_classes_is_refused(tmp_path):
    model = ImageDiT(1, 5, 8, patch=4, dim=16, n_layers=1, n_heads=2)
    with pytest.raises(ValueError, match="made for 5 classes, the data has 2"):
        train(model, Stripes(), tmp_path / "model.safetensors", steps=1)


@pytest.mark.parametrize(
    "name, value",
    [("batch_size", 0), ("lr", 0.0), ("lr", math.nan), ("grad_clip", -1.0), ("warmup", -1), ("ema_decay", 1.0),
     ("label_dropout", 1.5), ("seed", -1)],
)  # fmt: skip
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: expected"):
        TrainConfig(**{name: value})


def test_checkpoint_keeps_scalars_odd_strides_and_settings(tmp_path):
    path = tmp_path / "folder" / "file.safetensors"
    tensors = {"a.b": torch.randn(3, 4).T, "scalar": torch.tensor(7.0), "half": torch.ones(2, dtype=torch.bfloat16)}
    save_checkpoint(path, {"model": tensors, "none": {}}, {"text": "ä", "list": [1, 2.5, None]})
    parts, settings = read_checkpoint(path)
    assert settings == {"text": "ä", "list": [1, 2.5, None]}
    assert parts.keys() == {"model"}
    for name, tensor in tensors.items():
        assert torch.equal(parts["model"][name], tensor)
