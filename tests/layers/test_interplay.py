"""What others do with layers and models: freeze and checkpoint them, copy them, ask for shapes alone, distribute them."""

import copy
import pickle
from functools import partial
from itertools import product

import pytest
import torch
from image_cases import image_model, images
from recorded_calls import RecordCalls
from test_changed_projections import CONTEXTS, DIM, LAYERS, PROJECTIONS, TOKENS, with_gradients
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from video_cases import inputs as video_inputs
from video_cases import small as small_video

from pom_ext import PoM
from pom_ext.models import ImageDiT

MIXERS = ["power", "product"]


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_weights(name):
    """Any of them, with tokens that need a gradient or not."""
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    parameters = dict(layer.named_parameters())
    groups = [[n for n in parameters if n.startswith(part)] for part in (*PROJECTIONS, "coeff")]
    for context in CONTEXTS[:2]:
        expected = with_gradients(partial(layer, **context), layer, x)
        for pattern in product((False, True), repeat=len(groups) + 1):
            tensors = {"x": x.clone(), **parameters}
            free = {n for group, needed in zip([["x"], *groups], pattern) if needed for n in group}
            for n, t in tensors.items():
                t.requires_grad_(n in free).grad = None
            y = layer(tensors["x"], **context)
            assert y.requires_grad == bool(free)
            torch.testing.assert_close(y.detach(), expected["y"])
            if free:
                y.square().sum().backward()
            assert {n for n, t in tensors.items() if t.grad is not None} == free
            torch.testing.assert_close({n: tensors[n].grad for n in free}, {n: expected[n] for n in free})
        layer.requires_grad_(True)


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointed_layers(name, reentrant):
    layer, x = PoM(DIM, **LAYERS[name]), torch.randn(2, TOKENS, DIM)
    for context in CONTEXTS:
        once = partial(layer, **context)
        again = partial(checkpoint, once, use_reentrant=reentrant)
        found, expected = (with_gradients(f, layer, x) for f in (again, once))
        # A reentrant one goes through without gradients first, and a layer that keeps nothing sums in another order.
        exact = {} if reentrant else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(found, expected, **exact)


@pytest.mark.parametrize("save", (True, False))
@pytest.mark.parametrize("mixer", ("power", "product"))
def test_selective_checkpoints(mixer, save):
    """A policy sees the operations by name: what it saves is not computed again, and what it does not is."""
    model, given = image_model(mixer=mixer, n_layers=2), images()

    def policy(context, operation, *arguments, **named):
        ours = operation.namespace == "pom_ext"
        return CheckpointPolicy.MUST_SAVE if ours == save else CheckpointPolicy.PREFER_RECOMPUTE

    def run(function):
        model.zero_grad()
        with RecordCalls() as record:
            y = function(*given)
            forward = len(record.calls)
            y.square().sum().backward()
        again = [op for op, _ in record.calls[forward:] if not op.__name__.endswith("backward.default")]
        return [y.detach(), *(p.grad.clone() for p in model.parameters())], forward, len(again)

    contexts = partial(create_selective_checkpoint_contexts, policy)
    found, calls, again = run(partial(checkpoint, model, use_reentrant=False, context_fn=contexts))
    expected, calls_before, again_before = run(model)
    assert all(map(torch.equal, found, expected))
    assert calls == calls_before > 0 and again - again_before == (0 if save else calls)


def test_pickles_and_state_dicts():
    model, given = image_model(mixer=MIXERS, n_layers=2), images()
    y = model(*given)
    tensors = model.state_dict()
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    other = ImageDiT(**model.config)
    with torch.device("meta"):
        empty = ImageDiT(**model.config)
    other.load_state_dict(tensors)
    empty.load_state_dict(tensors, assign=True)
    for same in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), other, empty):
        assert torch.equal(same(*given), y)
    name = "blocks.0.mixer.coeff"
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        other.load_state_dict({key: t for key, t in tensors.items() if key != name})
    with pytest.raises(RuntimeError, match='Unexpected key.*"blocks.1.mixer.coeff"'):
        other.load_state_dict(tensors | {"blocks.1.mixer.coeff": tensors[name]})
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        other.load_state_dict(tensors | {name: tensors[name][:, :2]})


@pytest.mark.parametrize("where", ("meta", "fake"))
def test_models_without_numbers(where):
    """Shapes of outputs and of gradients, on the meta device and with fake tensors."""
    image, video = image_model(mixer=MIXERS, n_layers=2), small_video(mixer=MIXERS, text_dim=5)
    given, clip = images(), video_inputs(video)
    if where == "meta":
        image, video = image.to("meta"), video.to("meta")
        given, clip = [t.to("meta") for t in given], {name: t.to("meta") for name, t in clip.items()}
        outputs = [image(*given), video(**clip, frame_causal=True)]
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            image, video = copy.deepcopy(image), copy.deepcopy(video)  # of weights that are fake too
            outputs = [image(*map(mode.from_tensor, given)), video(**clip, frame_causal=True)]
    for model, y, shape in zip((image, video), outputs, (given[0].shape, clip["video"].shape)):
        y.sum().backward()
        assert y.shape == shape
        assert all(p.grad.shape == p.shape for p in model.parameters())


@pytest.fixture(scope="module")
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ("data parallel", "fully sharded"))
def test_distributed(how, one_process):
    model, given = image_model(mixer=MIXERS, n_layers=2), images()
    other = copy.deepcopy(model)
    if how == "data parallel":
        wrapped = nn.parallel.DistributedDataParallel(other)
    else:
        shard = partial(torch.distributed.fsdp.fully_shard, mesh=one_process)
        for block in other.blocks:
            shard(block.mixer.out_proj)  # whose weight is whole during its own call alone
            shard(block)
        wrapped = shard(other)
    for _ in range(2):
        for each in (model, wrapped):
            optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
            each(*given).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, parameter), same in zip(model.named_parameters(), other.parameters()):
        whole = same.full_tensor() if how == "fully sharded" else same
        torch.testing.assert_close(whole, parameter, msg=name)
