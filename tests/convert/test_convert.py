"""The authors' weights in our modules against what the authors' code computed with them, gradients included."""

import pytest
import torch
from golden_vectors import load, names, relative_error

from pom_ext.convert import image_dit_from_homm, pom_from_homm, pom_from_pom, video_dit_from_homm

LAYERS = names("product_*", "power_*", "rope_*")
MODELS = names("model_dih", "model_dihpp*")
VIDEO_MODELS = names("model_tvdih*")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


def build_layer(meta, params):
    if meta.get("form") == "product":
        return pom_from_homm(params, meta["degree"], meta["expand"])
    heads = meta["n_sel_heads"]
    return pom_from_pom(params, meta["degree"], meta["expand"], meta.get("n_groups", 1), heads, rope=meta.get("rope"))


def run_layer(layer, meta, inputs):
    context = {"pad": {"weight": inputs.get("mask")}, "full": {"mask": inputs.get("mask")}, "causal": {"causal": True}}
    positions = {"positions": inputs["positions_hw"]} if "positions_hw" in inputs else {}
    return layer(inputs["xq"], inputs.get("xc"), **context.get(meta["mode"], {}), **positions)


def layer_gradients(layer, params):
    """Our gradients under the authors' names."""
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    if "ho_proj.weight" in params:
        theirs = {"ho_proj": "context_proj", "se_proj": "gate_proj", "ag_proj": "out_proj"}
        return {name: grads[f"{theirs[name.split('.')[0]]}.{name.split('.')[1]}"] for name in params}
    renamed = {"po_coeff": grads["coeff"], "ag_proj.weight": grads["out_proj.weight"]}
    if "ag_proj.bias" in params:
        renamed["ag_proj.bias"] = grads["out_proj.bias"]
    if "qc_proj.weight" in params:
        renamed["qc_proj.weight"] = torch.cat([grads["context_proj.weight"], grads["gate_proj.weight"]])
        return renamed | {"se_bias": grads["gate_proj.bias"]}
    renamed["po_proj.weight"] = grads["context_proj.weight"].reshape(params["po_proj.weight"].shape)
    renamed |= {"se_proj.weight": grads["gate_proj.weight"], "se_proj.bias": grads["gate_proj.bias"]}
    return renamed | ({"po_proj.bias": grads["context_proj.bias"]} if "po_proj.bias" in params else {})


def model_gradients(model, params):
    """Our gradients under the authors' names."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    linears = {"time_emb.0": "time_embed.mlp.0", "time_emb.2": "time_embed.mlp.2", "out_proj": "patch_out"}
    linears["out_mod.1"] = "norm_out.modulation"
    renamed, video = {}, "text_emb.weight" in params
    if video:
        linears |= {"in_proj": "patch_in", "text_emb": "text_embed"}
    else:
        dim, patch, channels = model.dim, model.patch, model.in_channels
        kernel = grads["patch_in.weight"].reshape(dim, patch, patch, channels).permute(0, 3, 1, 2)
        renamed |= {"in_conv.weight": kernel, "in_conv.bias": grads["patch_in.bias"]}
        renamed["classes_emb.weight"] = grads["label_embed.weight"]
    norms, gates = (("cross", "text", "mixer", "ffw"), ("cross", "mixer", "ffw")) if video else (("mixer", "ffw"),) * 2
    mixers = {"hom": "mixer", "c_hom": "cross_mixer"} if video else {"hom": "mixer"}
    for layer in range(len(model.blocks)):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        linears |= {f"{theirs}.ffw.0": f"{ours}.ffw.0", f"{theirs}.ffw.2": f"{ours}.ffw.2"}
        for hom, mixer in mixers.items():
            for name, our_name in (("ho_proj", "context_proj"), ("se_proj", "gate_proj"), ("ag_proj", "out_proj")):
                linears[f"{theirs}.{hom}.{name}"] = f"{ours}.{mixer}.{our_name}"
        for kind in ("weight", "bias"):
            modulations = [grads[f"{ours}.{norm}_norm.modulation.{kind}"] for norm in norms]
            renamed[f"{theirs}.cond_mlp.1.{kind}"] = torch.cat(modulations)
            renamed[f"{theirs}.gate_mlp.1.{kind}"] = torch.cat([grads[f"{ours}.{gate}_gate.{kind}"] for gate in gates])
    renamed |= {f"{a}.{kind}": grads[f"{b}.{kind}"] for a, b in linears.items() for kind in ("weight", "bias")}
    if "registers" in params:
        condition = torch.cat([grads["register_cond"], grads["position_cond.table"].flatten(0, 1)])
        positions = grads["positions.table"].flatten(0, 1)
        renamed |= {"registers": grads["registers"][None], "pos_emb": positions[None], "cond_pos_emb": condition[None]}
    return renamed


def assert_same(name, actual, expected, tolerance):
    assert actual.shape == expected.shape, name
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


@DTYPES
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_the_authors(name, dtype):
    golden = load(name, dtype)
    meta, tolerance = golden.meta, TOLERANCE[dtype]
    if meta.get("form") == "product" and meta["mode"] in ("pad", "full"):
        tolerance = max(tolerance, 1e-7)  # the authors divide by the count + 1e-7
    layer = build_layer(meta, golden.params)
    inputs = {key: x.requires_grad_(key in golden.input_grads) for key, x in golden.inputs.items()}
    out = run_layer(layer, meta, inputs)
    out.backward(golden.grad_out.to(dtype))

    assert out.dtype == dtype
    assert_same("out", out, golden.out, tolerance)
    for key, expected in golden.input_grads.items():
        assert_same(key, inputs[key].grad, expected, tolerance)
    gradients = layer_gradients(layer, golden.params)
    assert set(gradients) == set(golden.param_grads)
    for key, expected in golden.param_grads.items():
        assert_same(key, gradients[key], expected, tolerance)


def build_model(meta, params, **changes):
    keys = ("input_dim", "n_classes", "im_size", "patch", "dim", "n_layers", "order", "order_expand", "ffw_expand")
    arguments = {key: meta[key] for key in keys} | {"n_registers": meta.get("n_registers", 0)}
    return image_dit_from_homm(params, **(arguments | changes))


@DTYPES
@pytest.mark.parametrize("name", MODELS)
def test_image_model_is_the_authors(name, dtype):
    golden = load(name, dtype)
    model = build_model(golden.meta, golden.params)
    images = golden.inputs["img"].requires_grad_()
    out = model(images, golden.inputs["time"], golden.inputs["cls"])
    out.backward(golden.grad_out.to(dtype))

    assert out.dtype == dtype
    assert_same("out", out, golden.out, TOLERANCE[dtype])
    assert_same("img", images.grad, golden.input_grads["img"], TOLERANCE[dtype])
    gradients = model_gradients(model, golden.params)
    assert set(gradients) == set(golden.param_grads)
    for key, expected in golden.param_grads.items():
        assert_same(key, gradients[key], expected, TOLERANCE[dtype])


def build_video_model(meta, params, **changes):
    keys = ("input_dim", "text_dim", "vid_size", "vid_length", "patch", "dim", "n_layers", "order", "order_expand")
    arguments = {key: meta[key] for key in (*keys, "ffw_expand")}
    return video_dit_from_homm(params, **(arguments | changes))


@DTYPES
@pytest.mark.parametrize("name", VIDEO_MODELS)
def test_video_model_is_the_authors(name, dtype):
    golden = load(name, dtype)
    tolerance = max(TOLERANCE[dtype], 1e-7)  # the authors divide by the count + 1e-7
    model = build_video_model(golden.meta, golden.params)
    video, text = (golden.inputs[key].requires_grad_() for key in ("vid", "txt"))
    weight = golden.inputs["mask"]
    assert not weight[2].any()  # the empty text
    causal = golden.meta["block_causal"]
    out = model(video, golden.inputs["time"], text, text_weight=weight, frame_causal=causal)
    out.backward(golden.grad_out.to(dtype))

    assert out.dtype == dtype
    for sample in range(3):
        assert_same(f"out[{sample}]", out[sample], golden.out[sample], tolerance)
    for key, tensor in (("vid", video), ("txt", text)):
        assert_same(key, tensor.grad, golden.input_grads[key], tolerance)
    gradients = model_gradients(model, golden.params)
    assert set(gradients) == set(golden.param_grads)
    for key, expected in golden.param_grads.items():
        assert_same(key, gradients[key], expected, tolerance)


def test_golden_vectors_are_all_there():
    assert (len(names("product_*")), len(names("power_*")), len(names("rope_*")), MODELS, VIDEO_MODELS) == (
        24, 24, 8, ["model_dih", "model_dihpp", "model_dihpp_resized"], ["model_tvdih_causal", "model_tvdih_joint"],
    )  # fmt: skip


def test_weights_are_copies():
    golden = load("product_self_k2_e2_d8")
    layer = build_layer(golden.meta, golden.params)
    before = golden.params["ho_proj.weight"].clone()
    with torch.no_grad():
        layer.context_proj.weight.zero_()
    assert torch.equal(golden.params["ho_proj.weight"], before)


def test_converted_model_rebuilds_from_its_config():
    golden = load("model_dihpp")
    model = build_model(golden.meta, golden.params)
    again = type(model)(**model.config).to(torch.float64)
    again.load_state_dict(model.state_dict())
    inputs = (golden.inputs["img"], golden.inputs["time"], golden.inputs["cls"])
    assert torch.equal(again(*inputs), model(*inputs))


@pytest.mark.parametrize("rope, width", [("1d", 16), ("2d", 8)])
def test_rotary_tables_are_checked_and_dropped(rope, width):
    golden = load(f"rope_self_{rope}_h4")
    keys = {"1d": ("freqs_cos", "freqs_sin"), "2d": ("row_cos", "row_sin", "col_cos", "col_sin")}[rope]

    def tables(base):
        angles = torch.arange(20)[:, None] / base ** (torch.arange(width) / width)
        return {key: angles.cos() if key.endswith("cos") else angles.sin() for key in keys}

    layer = build_layer(golden.meta, golden.params | tables(10000))
    assert "freqs_cos" not in layer.state_dict()
    with pytest.raises(ValueError, match=f"'{keys[0]}' holds rotary angles of another base"):
        build_layer(golden.meta, golden.params | tables(500))


LAYER_ERRORS = {
    "missing": (lambda p: p.pop("ho_proj.bias"), {}, r"missing 'ho_proj\.bias' \(32,\)"),
    "unexpected": (lambda p: p.update(extra=torch.zeros(3)), {}, "unexpected 'extra'"),
    "degree": (lambda p: None, {"degree": 3}, r"'ho_proj\.weight' has shape \(32, 8\), expected \(48, 8\)"),
    "wrapped": (lambda p: (p.update(state_dict=dict(p)), [p.pop(k) for k in list(p)[:-1]]), {}, "no layer of the auth"),
}


@pytest.mark.parametrize("case", LAYER_ERRORS)
def test_layer_errors_name_the_key(case):
    change, arguments, message = LAYER_ERRORS[case]
    golden = load("product_self_k2_e2_d8")
    change(golden.params)
    with pytest.raises(ValueError, match=message):
        pom_from_homm(golden.params, **({"degree": 2, "expand": 2} | arguments))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_groups": 4}, "missing 'po_proj.weight'.*unexpected 'qc_proj.weight'"),
        ({"n_groups": 3}, "n_groups: expected a divisor of the layer's width 8, got 3"),
        ({"n_sel_heads": 2}, r"'qc_proj.weight' has shape \(20, 8\), expected \(18, 8\)"),
        ({"rope": "4d"}, "rope: expected None, '1d' or '2d', got '4d'"),
        ({"rope": "1d", "n_sel_heads": 1}, "'se_bias' has shape"),
    ],
    ids=["grouped", "indivisible", "heads", "rope", "rope-heads"],
)
def test_power_layer_errors_name_the_key(changes, message):
    golden = load("power_self_k2_e2_g1_h4_d8")
    with pytest.raises(ValueError, match=message):
        pom_from_pom(golden.params, **({"degree": 2, "expand": 2, "n_groups": 1, "n_sel_heads": 4} | changes))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("model_dih", {"n_layers": 3}, r"missing 'layers\.2\.hom\.ho_proj\.weight' .* and 6 more"),
        ("model_dih", {"n_layers": 1}, r"unexpected 'layers\.1\.hom\.ho_proj\.weight'"),
        ("model_dih", {"n_classes": 7}, r"'classes_emb\.weight' has shape \(11, 16\), expected \(8, 16\)"),
        ("model_dih", {"n_registers": 4}, "missing 'cond_pos_emb'"),
        ("model_dihpp", {"n_registers": 0}, "model with 4 registers, got n_registers=0"),
        ("model_dihpp", {"im_size": 16}, r"'pos_emb' has shape \(1, 16, 16\), expected \(1, 64, 16\)"),
    ],
    ids=["deeper", "shallower", "classes", "no-registers", "registers", "size"],
)
def test_image_model_errors_name_the_key(name, changes, message):
    golden = load(name)
    with pytest.raises(ValueError, match=message):
        build_model(golden.meta, golden.params, **changes)


def test_image_model_of_another_time_range_is_refused():
    golden = load("model_dih")
    golden.params["freqs"] = torch.exp(-2 * torch.log(torch.tensor(100.0)) * torch.arange(8) / 16)
    with pytest.raises(ValueError, match="'freqs' holds the frequencies of another range of time"):
        build_model(golden.meta, golden.params)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"n_layers": 3}, r"missing 'layers\.2\.c_hom\.ho_proj\.weight' .* and 12 more"),
        ({"text_dim": 10}, r"'text_emb\.weight' has shape \(16, 12\), expected \(16, 10\)"),
        ({"patch": (1, 2, 2)}, r"'in_proj\.weight' has shape \(16, 24\), expected \(16, 12\)"),
        ({"order": 3}, r"'layers\.0\.c_hom\.ho_proj\.weight' has shape \(64, 16\), expected \(96, 16\)"),
        ({"vid_length": 5}, r"length: expected a multiple of the patch"),
    ],
    ids=["deeper", "text", "patch", "order", "length"],
)
def test_video_model_errors_name_the_key(changes, message):
    golden = load("model_tvdih_causal")
    with pytest.raises(ValueError, match=message):
        build_video_model(golden.meta, golden.params, **changes)


def test_converted_video_model_rebuilds_from_its_config():
    golden = load("model_tvdih_joint")
    model = build_video_model(golden.meta, golden.params)
    again = type(model)(**model.config).to(torch.float64)
    again.load_state_dict(model.state_dict())
    inputs = (golden.inputs["vid"], golden.inputs["time"], golden.inputs["txt"])
    assert torch.equal(again(*inputs), model(*inputs))
