"""From noise to data along the path that a network has learned: the solvers, for images and frames alike."""

import itertools
import math

from .objectives import TIME_SCALE, FlowMatching, MeanFlow, shift_time

SOLVERS = ("euler", "heun")


def integrate(velocity, x, times, solver="euler"):
    """Follow dx/dt = velocity(x, t) through `times`, a sequence of numbers, and return x at the last of them.

    "euler" evaluates the velocity once a step and is of order 1, "heun" twice and of order 2. All arithmetic is in
    the dtype of x (the flow-matching schedulers of diffusers, otherwise the same, go through float32).
    """
    for now, after in itertools.pairwise(times):
        slope = velocity(x, now)
        if solver == "heun":
            slope = (slope + velocity(x + (after - now) * slope, after)) / 2
        x = x + (after - now) * slope
    return x


def flow_times(steps, shift=1.0):
    """The steps + 1 times 1 = t_0 > ... > t_steps = 0 that a sampler visits, shifted towards noise."""
    return [shift_time(1 - i / steps, shift) for i in range(steps + 1)]


def denoise_ddim(predict, x, scheduler, steps):
    """Deterministic DDIM, with the schedule of `NoisePrediction.scheduler`; predict(x, time) is the noise in x."""
    scheduler.set_timesteps(steps, device=x.device)
    for time in scheduler.timesteps:
        x = scheduler.step(predict(x, time), time, x).prev_sample
    return x


def denoise_in_spans(predict, x, times):
    """Go through `times` by predict(x, time, span), the mean velocity between two of them: exact but for the network's
    error, even in a single step (arXiv 2505.13447, equation 12)."""
    for now, after in itertools.pairwise(times):
        x = x - (now - after) * predict(x, TIME_SCALE * now, TIME_SCALE * (now - after))
    return x


def evaluations(steps, solver):
    """How often `denoise` asks for a prediction."""
    return 2 * steps if solver == "heun" else steps


def denoise(predict, noise, objective, steps, solver="euler"):
    """Data from noise (B, ...), by the network's predict(x, time), time a number in [0, 1000] as the network takes it.

    `objective` is what the network was trained for. "euler" is DDIM for noise prediction; "heun" is for flow matching.
    For MeanFlow it is predict(x, time, span).
    """
    if isinstance(objective, MeanFlow):
        return denoise_in_spans(predict, noise, flow_times(steps, objective.shift))
    if isinstance(objective, FlowMatching):
        times = flow_times(steps, objective.shift)
        return integrate(lambda x, t: predict(x, TIME_SCALE * t), noise, times, solver)
    return denoise_ddim(lambda x, time: predict(x, float(time)), noise, objective.scheduler, steps)


def check_solver(objective, steps, guidance, solver):
    """ValueError unless the arguments are those of a solver."""
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance: expected a number of at least 0, got {guidance}")
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {list(SOLVERS)}, got {solver!r}")
    if solver == "heun" and type(objective) is not FlowMatching:
        raise ValueError("solver: 'heun' is for flow matching; use 'euler' with noise prediction and MeanFlow")
    if guidance != 1 and isinstance(objective, MeanFlow):
        raise ValueError(f"guidance: expected 1, for it is trained into a MeanFlow model, got {guidance}")
