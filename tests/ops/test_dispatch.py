"""Which implementation a call takes, and what is said of the others."""

import os
import subprocess
import sys

import pytest
import torch

from pom_ext import PoM
from pom_ext.ops import dispatch


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
        [sys.executable, "-c", code], env={**os.environ, "POM_EXT_EXPLAIN": asked},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    logged = [line for line in done.stderr.splitlines() if line.startswith("layer")]
    assert len(logged) == (3 if asked == "1" else 0) and len(set(logged)) == len(logged)
