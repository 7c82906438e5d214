"""Derivatives of the operations, in terms of the operations.

The kernels take tangents: with `u_tangent` and `coeff_tangent` the features φ stand for their derivative in that direction,
with `gate_tangent` so do the gates, and gradients stand for their derivatives likewise. State, readout and mix are
linear in features and in gates, so every derivative is a sum of calls with one of the two replaced. A gradient is linear
in what comes back, and its derivative in a direction is symmetric: so the derivatives of the backward operations are
those same calls. Third derivatives raise.

Every function takes the arguments of its operation by name (`x`), as `_autograd.differentiable` says.
"""

import torch

from ._autograd import has_tangent, needs_gradient
from .state import State, two_sum

ops = torch.ops.pom_ext


def _third(name):
    raise NotImplementedError(
        f"pom_ext: third derivatives are not defined, and second ones by forward mode alone ({name})"
    )


def _zeros(like):
    """Zeros with channels next to each other, of no size."""
    return like.new_zeros(1, 1, like.shape[2]).expand(like.shape)


def _along(x, u, coeff):
    """The arguments with a direction of u and coeff; either may be None."""
    if x["u_tangent"] is not None:
        _third("u")
    direction = {"u_tangent": _zeros(x["u"]) if u is None else u, "coeff_tangent": None}
    if x["coeff"] is not None:
        direction["coeff_tangent"] = torch.zeros_like(x["coeff"]) if coeff is None else coeff
    return x | direction


def _gated(x, gate):
    """The arguments with a direction of the gates."""
    if x["gate_tangent"] is not None:
        _third("gate")
    return x | {"gate_tangent": gate}


def _undirected(x):
    return x | {"u_tangent": None, "coeff_tangent": None}


def _from(x, total, residual):
    """The arguments with another state."""
    total = torch.zeros_like(x["total"]) if total is None else total
    return x | {"total": total, "residual": torch.zeros_like(total) if residual is None else residual}


def _moved_state(x, t):
    """Total and residual of the direction that `t` has of a state."""
    moved = _from(x, t.get("total"), t.get("residual"))
    return {name: moved[name] for name in STATE}


def _without(x, *names):
    return {name: value for name, value in x.items() if name not in names}


def _only(t, *names):
    """Whether there are tangents of these arguments."""
    return any(name in t for name in names)


def _refuse(t, *names):
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


def _feature_directions(x, t):
    """The arguments for every direction of the features that `t` has."""
    if _only(t, "u", "coeff"):
        yield _along(x, t.get("u"), t.get("coeff"))
    if _only(t, "u_tangent", "coeff_tangent"):
        yield _along(_undirected(x), t.get("u_tangent"), t.get("coeff_tangent"))


def _gate_directions(x, t):
    if "gate" in t:
        yield _gated(x, t["gate"])
    if "gate_tangent" in t:
        yield x | {"gate_tangent": t["gate_tangent"]}


NO_DIRECTION = {"total_tangent": None, "residual_tangent": None}
FEATURES = ("u", "coeff", "u_tangent", "coeff_tangent")
GATES = ("gate", "gate_tangent")
STATE = ("total", "residual")
NO_PRIOR = {"total": None, "residual": None, "count": None}


def prior_grads(grad_total):
    """Gradients of a state from before, which was added to every group."""
    grad = grad_total if grad_total.shape[1] == 1 else grad_total.sum(1, keepdim=True)
    return {"total": grad, "residual": grad}


def moved_prior(t):
    """The direction that `t` has of a state from before, as a state from before."""
    if not _only(t, *STATE):
        return NO_PRIOR
    total = t["total"] if "total" in t else torch.zeros_like(t["residual"])
    residual = t["residual"] if "residual" in t else torch.zeros_like(total)
    return {"total": total, "residual": residual, "count": total.new_zeros(total.shape[:2], dtype=torch.float64)}


def _rounded(t):
    """The direction that `t` has of a state alone, as total and residual of what operations make of it."""
    moved = moved_prior(t)
    return two_sum(moved["total"], moved["residual"]) if "residual" in t else (moved["total"], moved["residual"])


def with_moving_count(operation):
    """The operation where the count from before has a derivative: then torch adds that state. Otherwise None.

    A count is a sum of weights, which have no derivative, so no kernel knows one of it.
    """
    names = [argument.name for argument in operation._schema.arguments]
    at = [names.index(name) for name in NO_PRIOR]

    def instead(*arguments):
        prior = [arguments[i] for i in at]
        count = prior[2:]
        if count[0] is None or not (needs_gradient(count) or has_tangent(count)):
            return None
        total, residual, count, *rest = operation(*(None if i in at else x for i, x in enumerate(arguments)))
        return *State(*prior).merge(State(total, residual, count)).state_dict().values(), *rest

    return instead


def state_vjp(x, needs, grad_total, grad_residual, grad_count):
    # The residual is rounding error of the total: as a function of the inputs its derivative is zero.
    if grad_total is None:
        return {}
    grads, x = prior_grads(grad_total) if needs.intersection(STATE) else {}, _without(x, *NO_PRIOR)
    if needs.isdisjoint(FEATURES):
        return grads
    grads |= zip(("u", "coeff"), ops.state_backward(grad_total=grad_total, **x))
    if x["u_tangent"] is not None:
        linear = ops.state_backward(grad_total=grad_total, **_undirected(x))
        grads |= zip(("u_tangent", "coeff_tangent"), linear)
    return grads


def state_jvp(x, t):
    _refuse(t, *FEATURES, *STATE)
    directions, moved = list(_feature_directions(x | NO_PRIOR, t)), moved_prior(t)
    if directions:
        directions[0] |= moved
        total, residual, _ = _sum([ops.state(**directed) for directed in directions])
        return total, residual, None
    return *(part.expand(-1, _groups(x), -1).contiguous() for part in _rounded(t)), None


def _groups(x):
    """How many groups the state has."""
    if x["mask"] is not None:
        return x["mask"].shape[1]
    return 1 if x["offsets"] is None else x["offsets"].shape[0] - 1


def state_backward_vjp(x, _, v_u, v_coeff):
    forward = _along(_without(x, "grad_total"), v_u, v_coeff)
    grads = dict(zip(("u", "coeff"), ops.state_backward(grad_total=x["grad_total"], **forward)))
    return grads | {"grad_total": ops.state(**forward, **NO_PRIOR)[0]}


def state_backward_jvp(x, t):
    _refuse(t, "grad_total", *FEATURES)
    parts = [ops.state_backward(**directed) for directed in _feature_directions(x, t)]
    if "grad_total" in t:
        parts.append(ops.state_backward(**x | {"grad_total": t["grad_total"]}))
    return _sum(parts)


def _still(x):
    """The arguments of a readout or of its gradient without directions."""
    return _without(x, "total_tangent", "residual_tangent") | {"gate_tangent": None}


def readout_vjp(x, _, grad_y):
    plain, gated = _still(x), _still(x) | {"gate_tangent": x["gate_tangent"]}
    gate, total = ops.readout_backward(grad_y=grad_y, **gated)
    grads = {"gate": gate, "total": total, "residual": total}
    if x["gate_tangent"] is not None:
        grads["gate_tangent"], along = ops.readout_backward(grad_y=grad_y, **plain)
    if x["total_tangent"] is not None:
        moved = _from(plain, x["total_tangent"], x["residual_tangent"])
        grads["gate"] = gate + ops.readout_backward(grad_y=grad_y, **moved)[0]
        grads |= {"total_tangent": along, "residual_tangent": along}
    return grads


def readout_jvp(x, t):
    _refuse(t, *GATES, *STATE, "total_tangent", "residual_tangent")
    still = _still(x) | NO_DIRECTION
    gated, parts = still | {"gate_tangent": x["gate_tangent"]}, []
    if "gate" in t and _only(t, *STATE):  # in one pass
        d_state = {f"{name}_tangent": value for name, value in _moved_state(x, t).items()}
        return ops.readout(**_gated(x, t["gate"]) | d_state)
    if "gate" in t:
        parts.append(ops.readout(**_gated(x, t["gate"])))
    if _only(t, *STATE):
        parts.append(ops.readout(**gated | _moved_state(x, t)))
    if "gate_tangent" in t:
        parts.append(ops.readout(**still | {"gate_tangent": t["gate_tangent"]}))
    if _only(t, "total_tangent", "residual_tangent"):
        moved = _from(still, t.get("total_tangent"), t.get("residual_tangent"))
        parts.append(ops.readout(**moved))
    return _sum(parts)


def readout_backward_vjp(x, _, v_gate, v_total):
    forward, grad_y, parts = _without(x, "grad_y"), x["grad_y"], []
    direction = {name: v for name, v in (("gate", v_gate), ("total", v_total)) if v is not None}
    if v_gate is not None:
        parts.append(ops.readout_backward(grad_y=grad_y, **_gated(forward, v_gate)))
    if v_total is not None:  # the gradient of a state does not depend on it
        gate, total = ops.readout_backward(grad_y=grad_y, **_from(forward, v_total, None))
        parts.append((gate, torch.zeros_like(total)))
    gate, total = _sum(parts)
    return {"grad_y": readout_jvp(forward | NO_DIRECTION, direction), "gate": gate, "total": total, "residual": total}


def readout_backward_jvp(x, t):
    _refuse(t, "grad_y", *GATES, *STATE)
    parts = [ops.readout_backward(**directed) for directed in _gate_directions(x, t)]
    if "grad_y" in t:
        parts.append(ops.readout_backward(**x | {"grad_y": t["grad_y"]}))
    if _only(t, *STATE):  # the gradient of a state does not depend on it
        grad_gate, grad_total = ops.readout_backward(**_from(x, t.get("total"), t.get("residual")))
        parts.append((grad_gate, torch.zeros_like(grad_total)))
    return _sum(parts)


def mix_vjp(x, _, grad_y, grad_total, grad_residual, grad_count):
    grads, parts = {}, [] if grad_total is None else [grad_total]
    if grad_y is not None:
        grads["gate"], grad_state = ops.readout_backward(grad_y=grad_y, **_readout_of(x, *x["out"]))
        parts.append(grad_state)
    if not parts:
        return {}
    grads["total"] = grads["residual"] = _sum(parts)
    return grads | dict(zip(("u", "coeff"), ops.state_backward(grad_total=grads["total"], **_state_of(x))))


def mix_jvp(x, t):
    _refuse(t, "u", "coeff", "gate", *STATE)
    moved = ()
    if _only(t, "u", "coeff"):
        along = _along(_state_of(x), t.get("u"), t.get("coeff"))
        moved = ops.state(**along, **moved_prior(t))[:2]
    elif _only(t, *STATE):
        moved = _rounded(t)
    direction = {name: t[name] for name in ("gate",) if name in t} | dict(zip(STATE, moved))
    y = readout_jvp(_readout_of(x, *x["out"]) | NO_DIRECTION, direction)
    return y, *(moved or map(torch.zeros_like, x["out"][:2])), None


def _state_of(x):
    """The arguments of the state that a mix makes."""
    names = ("u", "coeff", "weight", "cos", "sin", "axes", "form", "degree")
    nothing = {"u_tangent": None, "coeff_tangent": None, "mask": None, "offsets": None, "cumulative": False}
    return {name: x[name] for name in names} | nothing


def _readout_of(x, total, residual, count):
    """The arguments of the readout that a mix ends with, of this state."""
    state = {"total": total, "residual": residual, "count": count}
    angles = {name: x[f"gate_{name}"] for name in ("cos", "sin", "axes")}
    rest = {"gate": x["gate"], "gate_tangent": None, "offsets": None, "form": x["form"], "heads": x["heads"]}
    return rest | state | angles


def causal_mix_vjp(x, _, grad_y, grad_total, grad_residual, grad_count):
    if grad_y is None and grad_total is None:
        return {}
    if grad_y is None:
        grad_y = _zeros(x["u"])
    u, gate, coeff, total = ops.causal_mix_backward(grad_y=grad_y, grad_total=grad_total, **x)
    grads = {"u": u, "gate": gate, "coeff": coeff, "total": total, "residual": total}
    if x["u_tangent"] is not None:
        u, _, coeff, _ = ops.causal_mix_backward(grad_y=grad_y, grad_total=grad_total, **_undirected(x))
        grads |= {"u_tangent": u, "coeff_tangent": coeff}
    if x["gate_tangent"] is not None:
        plain = x | {"gate_tangent": None}
        grads["gate_tangent"] = ops.causal_mix_backward(grad_y=grad_y, grad_total=None, **plain)[1]
    return grads


def _moved(x, t):
    """The arguments of a causal mix whose features and prior state are replaced by the direction `t` of them."""
    x = _along(x, t.get("u"), t.get("coeff"))
    return x if x["total"] is None else _from(x, t.get("total"), t.get("residual"))


def causal_mix_jvp(x, t):
    _refuse(t, *FEATURES, *GATES, *STATE)
    if "gate" in t and x["u_tangent"] is not None or _only(t, "u", "coeff") and x["gate_tangent"] is not None:
        _third("u and gate")
    parts = []
    for directed in _gate_directions(x, t):  # the state does not depend on the gates
        y, total, residual, _ = ops.causal_mix(**directed)
        parts.append((y, torch.zeros_like(total), torch.zeros_like(residual)))
    if _only(t, "u", "coeff", *STATE):
        if x["u_tangent"] is not None and not _only(t, "u", "coeff"):
            # The features are a direction already, and the prior beside them is one too.
            zero = {"u_tangent": _zeros(x["u"])}
            zero |= {} if x["coeff"] is None else {"coeff_tangent": torch.zeros_like(x["coeff"])}
            parts.append(ops.causal_mix(**_from(x | zero, t.get("total"), t.get("residual")))[:3])
        else:
            parts.append(ops.causal_mix(**_moved(x, t))[:3])
    if _only(t, "u_tangent", "coeff_tangent"):
        linear = {"u": t.get("u_tangent"), "coeff": t.get("coeff_tangent")}
        parts.append(ops.causal_mix(**_moved(_undirected(x), linear))[:3])
    return *_sum(parts), None


def causal_mix_backward_vjp(x, _, v_u, v_gate, v_coeff, v_total):
    forward = _without(x, "grad_y", "grad_total")
    direction = {"u": v_u, "gate": v_gate, "coeff": v_coeff, "total": v_total}
    direction = {name: v for name, v in direction.items() if v is not None and forward[name] is not None}
    grads = dict(zip(("grad_y", "grad_total"), causal_mix_jvp(forward, direction)))
    grads |= zip(("u", "gate", "coeff", "total"), _causal_slopes_along(x, direction))
    return grads | {"residual": grads["total"]}


def _causal_slopes_along(x, t):
    """The derivative of the gradients (u, gate, coeff, total) in the direction `t`, for what comes back held fixed."""
    parts = []
    if _only(t, "u", "coeff", *STATE):  # the gradient of the prior does not depend on the features
        *grads, grad_total = ops.causal_mix_backward(**_moved(x, t))
        parts.append((*grads, torch.zeros_like(grad_total)))
    if "gate" in t:
        parts.append(ops.causal_mix_backward(**_gated(x, t["gate"]) | {"grad_total": None}))
    return _sum(parts)


def causal_mix_backward_jvp(x, t):
    _refuse(t, "grad_y", "grad_total", "u", "coeff", "gate", *STATE)
    parts = []
    if _only(t, "u", "coeff", "gate", *STATE):
        parts.append(_causal_slopes_along(x, t))
    if _only(t, "grad_y", "grad_total"):
        grad_y = t["grad_y"] if "grad_y" in t else torch.zeros_like(x["grad_y"])
        parts.append(ops.causal_mix_backward(**x | {"grad_y": grad_y, "grad_total": t.get("grad_total")}))
    return _sum(parts)
