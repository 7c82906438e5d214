"""Derivatives of the operations, in terms of the operations.

The kernels take tangents: with `u_tangent` and `coeff_tangent` the features φ stand for their derivative in that
direction, with `gate_tangent` so do the gates, and gradients stand for their derivatives likewise. State, readout and
mix are linear in features and in gates, so every derivative is a sum of calls with one of the two replaced. A gradient
is linear in the gradient that comes in, and its derivative in a direction is symmetric: so the derivatives of the
backward operations are those same calls. Third derivatives raise.

Every function takes the arguments of its operation by name (`x`), and tangents by name (`t`), as
`_autograd.differentiable` says.
"""

from typing import Any

import torch

from .arguments import call
from .state import State, two_sum

FEATURES = ("u", "coeff", "u_tangent", "coeff_tangent")
GATES = ("gate", "gate_tangent")
STATE = ("total", "residual")
NO_PRIOR = {"total": None, "residual": None, "count": None}
NO_FEATURE_TANGENT = {"u_tangent": None, "coeff_tangent": None}
NO_GATE_TANGENT = {"gate_tangent": None}
NO_STATE_TANGENT = {"total_tangent": None, "residual_tangent": None}


def _third(name):
    raise NotImplementedError(
        f"pom_ext: third derivatives are not defined, and second ones by forward mode alone ({name})"
    )


def _zeros(like):
    """Zeros with channels next to each other, of no size."""
    return like.new_zeros(1, 1, like.shape[2]).expand(like.shape)


def _any(t, *names):
    """Whether one of these arguments has a tangent."""
    return any(name in t for name in names)


def _refuse_others(t, *names):
    for name in t:
        if name not in names:
            raise RuntimeError(
                f"{name}: expected no tangent, since the operation has no derivative with respect to it; detach it"
            )


def _sum(parts):
    """The sum of results, each a tensor or a tuple of tensors."""
    total, *rest = parts
    for part in rest:
        total = total + part if isinstance(total, torch.Tensor) else tuple(a + b for a, b in zip(total, part))
    return total


def _with_feature_tangent(x, u, coeff):
    """The arguments with a tangent of u and coeff; either may be None."""
    if x["u_tangent"] is not None:
        _third("u")
    tangent = {"u_tangent": _zeros(x["u"]) if u is None else u, "coeff_tangent": None}
    if x["coeff"] is not None:
        tangent["coeff_tangent"] = torch.zeros_like(x["coeff"]) if coeff is None else coeff
    return x | tangent


def _with_gate_tangent(x, gate):
    if x["gate_tangent"] is not None:
        _third("gate")
    return x | {"gate_tangent": gate}


def _with_state(x, total, residual):
    """The arguments with another state; either part may be None."""
    total = torch.zeros_like(x["total"]) if total is None else total
    return x | {"total": total, "residual": torch.zeros_like(total) if residual is None else residual}


def _feature_calls(x, t):
    """The arguments of a call for every tangent of the features."""
    if _any(t, "u", "coeff"):
        yield _with_feature_tangent(x, t.get("u"), t.get("coeff"))
    if _any(t, "u_tangent", "coeff_tangent"):
        yield _with_feature_tangent(x | NO_FEATURE_TANGENT, t.get("u_tangent"), t.get("coeff_tangent"))


def _gate_calls(x, t):
    """The arguments of a call for every tangent of the gates."""
    if "gate" in t:
        yield _with_gate_tangent(x, t["gate"])
    if "gate_tangent" in t:
        yield x | {"gate_tangent": t["gate_tangent"]}


def prior_grads(grad_total):
    """Gradients of a prior state, which was added to every group."""
    grad = grad_total if grad_total.shape[1] == 1 else grad_total.sum(1, keepdim=True)
    return {"total": grad, "residual": grad}


def _prior_tangent(t) -> dict[str, Any]:
    """The tangent of a prior state, as the prior state of a call."""
    if not _any(t, *STATE):
        return NO_PRIOR
    total = t["total"] if "total" in t else torch.zeros_like(t["residual"])
    residual = t["residual"] if "residual" in t else torch.zeros_like(total)
    return {"total": total, "residual": residual, "count": total.new_zeros(total.shape[:2], dtype=torch.float64)}


def _rounded_prior_tangent(t):
    """The tangent of a prior state alone, split into total and residual as the kernels split it."""
    total, residual, _ = _prior_tangent(t).values()
    return two_sum(total, residual) if "residual" in t else (total, residual)


def merge_prior(operation):
    """with_count(args) of an operation: the call without its prior state, which torch adds.

    The count is a sum of weights, which have no derivative, so no kernel knows a derivative of the count.
    """

    def merged(x):
        total, residual, count, *others = call(operation, x, NO_PRIOR)
        prior = State(*(x[name] for name in NO_PRIOR))
        return *prior.merge(State(total, residual, count)).to_kernel().values(), *others

    return merged


def state_vjp(x, needed, grad_total, grad_residual, grad_count):
    # The residual is rounding error of the total: as a function of the inputs its derivative is zero.
    if grad_total is None:
        return {}
    grads = prior_grads(grad_total) if needed.intersection(STATE) else {}
    if needed.isdisjoint(FEATURES):
        return grads
    grads |= zip(("u", "coeff"), call("state_backward", x, grad_total=grad_total))
    if x["u_tangent"] is not None:
        linear = call("state_backward", x, NO_FEATURE_TANGENT, grad_total=grad_total)
        grads |= zip(("u_tangent", "coeff_tangent"), linear)
    return grads


def state_jvp(x, t):
    _refuse_others(t, *FEATURES, *STATE)
    calls = list(_feature_calls(x | NO_PRIOR, t))
    if calls:
        calls[0] |= _prior_tangent(t)
        total, residual, _ = _sum([call("state", arguments) for arguments in calls])
        return total, residual, None
    return *(part.expand(-1, group_count(x), -1).contiguous() for part in _rounded_prior_tangent(t)), None


def group_count(x):
    """How many groups the state has."""
    if x["mask"] is not None:
        return x["mask"].shape[1]
    return 1 if x["offsets"] is None else x["offsets"].shape[0] - 1


def state_backward_vjp(x, _, v_u, v_coeff):
    forward = _with_feature_tangent(x, v_u, v_coeff)
    grads = dict(zip(("u", "coeff"), call("state_backward", forward)))
    return grads | {"grad_total": call("state", forward)[0]}


def state_backward_jvp(x, t):
    _refuse_others(t, "grad_total", *FEATURES)
    parts = [call("state_backward", arguments) for arguments in _feature_calls(x, t)]
    if "grad_total" in t:
        parts.append(call("state_backward", x, grad_total=t["grad_total"]))
    return _sum(parts)


def readout_vjp(x, _, grad_y):
    gate, total = call("readout_backward", x, grad_y=grad_y)
    grads = {"gate": gate, "total": total, "residual": total}
    if x["gate_tangent"] is not None:
        grads["gate_tangent"], linear = call("readout_backward", x, NO_GATE_TANGENT, grad_y=grad_y)
    if x["total_tangent"] is not None:
        other = _with_state(x | NO_GATE_TANGENT, x["total_tangent"], x["residual_tangent"])
        grads["gate"] = gate + call("readout_backward", other, grad_y=grad_y)[0]
        grads |= {"total_tangent": linear, "residual_tangent": linear}
    return grads


def readout_jvp(x, t):
    _refuse_others(t, *GATES, *STATE, "total_tangent", "residual_tangent")
    plain = x | NO_GATE_TANGENT | NO_STATE_TANGENT
    if "gate" in t and _any(t, *STATE):  # in one pass
        tangent = _with_state(x, t.get("total"), t.get("residual"))
        state = {f"{name}_tangent": tangent[name] for name in STATE}
        return call("readout", _with_gate_tangent(x, t["gate"]), state)
    parts = []
    if "gate" in t:
        parts.append(call("readout", _with_gate_tangent(x, t["gate"])))
    if _any(t, *STATE):
        tangent = _with_state(plain, t.get("total"), t.get("residual"))
        parts.append(call("readout", tangent, gate_tangent=x["gate_tangent"]))
    if "gate_tangent" in t:
        parts.append(call("readout", plain, gate_tangent=t["gate_tangent"]))
    if _any(t, "total_tangent", "residual_tangent"):
        parts.append(call("readout", _with_state(plain, t.get("total_tangent"), t.get("residual_tangent"))))
    return _sum(parts)


def readout_backward_vjp(x, _, v_gate, v_total):
    parts, tangents = [], {name: v for name, v in (("gate", v_gate), ("total", v_total)) if v is not None}
    if v_gate is not None:
        parts.append(call("readout_backward", _with_gate_tangent(x, v_gate)))
    if v_total is not None:  # the gradient of a state does not depend on it
        gate, total = call("readout_backward", _with_state(x, v_total, None))
        parts.append((gate, torch.zeros_like(total)))
    gate, total = _sum(parts)
    grad_y = readout_jvp(x | NO_STATE_TANGENT, tangents)
    return {"grad_y": grad_y, "gate": gate, "total": total, "residual": total}


def readout_backward_jvp(x, t):
    _refuse_others(t, "grad_y", *GATES, *STATE)
    parts = [call("readout_backward", arguments) for arguments in _gate_calls(x, t)]
    if "grad_y" in t:
        parts.append(call("readout_backward", x, grad_y=t["grad_y"]))
    if _any(t, *STATE):  # the gradient of a state does not depend on it
        grad_gate, grad_total = call("readout_backward", _with_state(x, t.get("total"), t.get("residual")))
        parts.append((grad_gate, torch.zeros_like(grad_total)))
    return _sum(parts)


def mix_vjp(x, _, grad_y, grad_total, grad_residual, grad_count):
    grads, parts = {}, [] if grad_total is None else [grad_total]
    if grad_y is not None:
        grads["gate"], grad_state = call("readout_backward", x, _new_state(x), grad_y=grad_y)
        parts.append(grad_state)
    if not parts:
        return {}
    grads["total"] = grads["residual"] = _sum(parts)
    return grads | dict(zip(("u", "coeff"), call("state_backward", x, grad_total=grads["total"])))


def mix_jvp(x, t):
    _refuse_others(t, "u", "coeff", "gate", *STATE)
    tangent = ()
    if _any(t, "u", "coeff"):
        tangent = call("state", _with_feature_tangent(x, t.get("u"), t.get("coeff")), _prior_tangent(t))[:2]
    elif _any(t, *STATE):
        tangent = _rounded_prior_tangent(t)
    tangents = {name: t[name] for name in ("gate",) if name in t} | dict(zip(STATE, tangent))
    y = readout_jvp(x | _new_state(x) | NO_STATE_TANGENT, tangents)
    return y, *(tangent or map(torch.zeros_like, x["out"][:2])), None


def _new_state(x):
    """The state that a mix made, as that of the readout that it ends with."""
    return State(*x["out"]).to_kernel()


def causal_mix_vjp(x, _, grad_y, grad_total, grad_residual, grad_count):
    if grad_y is None and grad_total is None:
        return {}
    incoming = {"grad_y": _zeros(x["u"]) if grad_y is None else grad_y, "grad_total": grad_total}
    u, gate, coeff, total = call("causal_mix_backward", x, incoming)
    grads = {"u": u, "gate": gate, "coeff": coeff, "total": total, "residual": total}
    if x["u_tangent"] is not None:
        u, _, coeff, _ = call("causal_mix_backward", x, incoming, NO_FEATURE_TANGENT)
        grads |= {"u_tangent": u, "coeff_tangent": coeff}
    if x["gate_tangent"] is not None:
        plain = x | incoming | NO_GATE_TANGENT
        grads["gate_tangent"] = call("causal_mix_backward", plain, grad_total=None)[1]
    return grads


def _causal_tangent(x, t):
    """The arguments of a causal mix with the tangents of features and prior state in their place."""
    x = _with_feature_tangent(x, t.get("u"), t.get("coeff"))
    return x if x["total"] is None else _with_state(x, t.get("total"), t.get("residual"))


def causal_mix_jvp(x, t):
    _refuse_others(t, *FEATURES, *GATES, *STATE)
    if "gate" in t and x["u_tangent"] is not None or _any(t, "u", "coeff") and x["gate_tangent"] is not None:
        _third("u and gate")
    parts = []
    for arguments in _gate_calls(x, t):  # the state does not depend on the gates
        y, total, residual, _ = call("causal_mix", arguments)
        parts.append((y, torch.zeros_like(total), torch.zeros_like(residual)))
    if _any(t, "u", "coeff", *STATE):
        # If the features are a tangent already, so is the prior state beside them: without tangents of u and coeff
        # theirs is zero.
        linear = x if _any(t, "u", "coeff") else x | NO_FEATURE_TANGENT
        parts.append(call("causal_mix", _causal_tangent(linear, t))[:3])
    if _any(t, "u_tangent", "coeff_tangent"):
        linear = {"u": t.get("u_tangent"), "coeff": t.get("coeff_tangent")}
        parts.append(call("causal_mix", _causal_tangent(x | NO_FEATURE_TANGENT, linear))[:3])
    return *_sum(parts), None


def causal_mix_backward_vjp(x, _, v_u, v_gate, v_coeff, v_total):
    tangents = {"u": v_u, "gate": v_gate, "coeff": v_coeff, "total": v_total}
    tangents = {name: v for name, v in tangents.items() if v is not None and x[name] is not None}
    grads: dict[str, Any] = dict(zip(("grad_y", "grad_total"), causal_mix_jvp(x, tangents)))
    grads |= zip(("u", "gate", "coeff", "total"), _causal_second_derivative(x, tangents))
    return grads | {"residual": grads["total"]}


def _causal_second_derivative(x, t):
    """The tangents of the gradients (u, gate, coeff, total), for a constant incoming gradient."""
    parts = []
    if _any(t, "u", "coeff", *STATE):  # the gradient of the prior does not depend on the features
        *grads, grad_total = call("causal_mix_backward", _causal_tangent(x, t))
        parts.append((*grads, torch.zeros_like(grad_total)))
    if "gate" in t:
        parts.append(call("causal_mix_backward", _with_gate_tangent(x, t["gate"]), grad_total=None))
    return _sum(parts)


def causal_mix_backward_jvp(x, t):
    _refuse_others(t, "grad_y", "grad_total", "u", "coeff", "gate", *STATE)
    parts = []
    if _any(t, "u", "coeff", "gate", *STATE):
        parts.append(_causal_second_derivative(x, t))
    if _any(t, "grad_y", "grad_total"):
        grad_y = t["grad_y"] if "grad_y" in t else torch.zeros_like(x["grad_y"])
        parts.append(call("causal_mix_backward", x, grad_y=grad_y, grad_total=t.get("grad_total")))
    return _sum(parts)
