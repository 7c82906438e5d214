"""Which implementation a call takes, and what is said of the others."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from pom_ext import PoM
from pom_ext.ops import dispatch
from pom_ext.ops.dispatch import folding_pays


def taken(layer, x, **context):
    with dispatch.explained() as decisions:
        layer(x, **context)
    return {decision.operation: decision for decision in decisions}


def layer(**options):
    return PoM(64, 3, **{"form": "power", "n_sel_heads": 4} | options)


def test_a_readout_with_heads_is_folded_if_that_pays():
    few, many = (taken(layer(), torch.randn(1, tokens, 64)) for tokens in (1, 500))
    assert many["layer readout"].taken == "folded into the output projection"
    assert few["layer readout"].taken == "streamed projection"
    ((name, reasons),) = few["layer readout"].refused
    assert name == "folded into the output projection" and "so few queries" in reasons[0]


def test_a_hooked_projection_is_called():
    hooked = layer(n_sel_heads=1)
    hooked.context_proj.register_forward_hook(lambda *_: None)
    decisions = taken(hooked, torch.randn(1, 20, 64))
    assert decisions["layer state"].taken == "stored projection"
    assert "no plain nn.Linear" in str(decisions["layer state"])
    assert decisions["layer readout"].taken == "streamed projection"


def test_causal_is_one_operation():
    decisions = taken(layer(), torch.randn(1, 20, 64), causal=True)
    assert list(decisions) == ["layer"] and decisions["layer"].taken == "one operation"


def test_an_unmeasured_kernel_is_registered_and_says_so():
    args = {"x": torch.randn(1, 2, 4), "offsets": None, "x_tangent": None}
    with dispatch.explained() as decisions:
        assert dispatch.choose("project_state on a GPU", args) == "blocks of tokens"
    assert decisions[0].refused == (("fused kernel", ("not measured on this GPU yet",)),)


def test_without_an_implementation_the_call_fails(monkeypatch):
    monkeypatch.setitem(dispatch.IMPLEMENTATIONS, "nothing", [("first", lambda call: ["it rains"])])
    with pytest.raises(NotImplementedError, match="nothing: .*first.*it rains"):
        dispatch.choose("nothing", None)


def test_every_operation_has_an_implementation_that_takes_all():
    """The last one registered is the way that always works."""
    for operation, implementations in dispatch.IMPLEMENTATIONS.items():
        assert implementations[-1][1](None) == [], operation


@pytest.mark.parametrize("asked", ("0", "1"))
def test_decisions_are_logged_once_if_the_environment_asks(asked):
    code = "import torch, pom_ext; layer = pom_ext.PoM(8); x = torch.ones(1, 3, 8); layer(x); layer(x)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "POM_EXT_EXPLAIN": asked},
        check=True,
        capture_output=True,
        text=True,
    )
    logged = [line for line in done.stderr.splitlines() if line.startswith("layer")]
    assert len(logged) == (3 if asked == "1" else 0) and len(set(logged)) == len(logged)


def test_when_folding_pays():
    x = torch.empty(1, 64, 512)
    assert folding_pays(x, 1, 1024, 8) and folding_pays(x, 4, 1024, 8) and folding_pays(x, 4, 1024, 8, even=False)
    assert not folding_pays(x, 1, 1024, 1)
    assert not folding_pays(x, 64, 1024, 8, even=False)
    assert not folding_pays(x[:, :1], 1, 1024, 8)


def test_when_folding_pays_on_a_gpu():
    """With gradients from as many queries of all samples on as its small kernels take; without, of a group."""
    pays = lambda batch, tokens, groups=1: folding_pays(
        SimpleNamespace(device=torch.device("cuda"), shape=(batch, tokens, 512)), groups, 1024, 8
    )
    assert pays(2, 2048) and pays(1, 4096, 64) and not pays(1, 4095) and not pays(2, 2047)
    with torch.no_grad():
        assert pays(1, 128) and pays(1, 1280, 10) and not pays(8, 127) and not pays(1, 1279, 10)


def test_decisions_are_those_of_the_thread_that_asks():
    with dispatch.explained() as decisions:
        thread = threading.Thread(target=layer(), args=(torch.randn(1, 20, 64),))
        thread.start()
        thread.join()
    assert decisions == []
