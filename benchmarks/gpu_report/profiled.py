"""A call of every large kernel, for Nsight Compute: `ncu --profile-from-start off python -m` this module.

Each call is made once before, outside of what is profiled; sizes are those of the benchmark at 64 MiB.
"""

import argparse
import sys
from functools import partial

import torch

# First smoke, which looks after the library that is to be tested.
from benchmarks.gpu_report.smoke import BF16, arguments, draw_readout_call, draw_state_call, has_kernel
from benchmarks.harness.measure import OURS
from benchmarks.harness.op_case import OpCase
from pom_ext.ops.arguments import call

TOKENS = 16384


def ours(*case, **more):
    """The call of a case of the benchmark."""
    return OpCase(*case, dtype=BF16, **more).setup().contenders[OURS]().call


def folded(device, tokens, dim, width):
    sizes = {"heads": 16, "width": width // 16, "batch": 1, "queries": tokens, "dim": dim, "out_dim": dim}
    args, question = arguments(draw_readout_call("whole", BF16, True, **sizes), device), "supports_fused_folded_readout"
    if has_kernel(question, device) and call(question, args):
        return partial(call, "fused_folded_readout", args)
    return None


def project(device, tokens, dim, width):
    drawn, question = draw_state_call("whole", BF16, True, 3, 1, tokens, dim, width), "supports_fused_project_state"
    args = arguments(drawn, device)
    if has_kernel(question, device) and call(question, args):
        return partial(call, "fused_project_state", args)
    return None


def calls(device, small=False):
    """{name: a function that makes the call ready}; it returns None if this device has no kernel for it."""
    tokens, width, dim = (96, 256, 64) if small else (TOKENS, 2048, 1024)
    power = {"tokens": tokens, "width": width, "device": device}
    frame = {"tokens": 96 if small else 256, "width": 48 if small else 2304, "device": device}
    return {
        "state": partial(ours, "state", "power", 3, **power),
        "state_product": partial(ours, "state", "product", 2, **frame, batch=2 if small else 64),
        "readout": partial(ours, "readout", "power", 3, **power),
        "state_backward": partial(ours, "state", "power", 3, **power, passes="backward"),
        "causal_mix": partial(ours, "causal_mix", "power", 3, **power),
        "causal_mix_backward": partial(ours, "causal_mix", "power", 3, **power, passes="backward"),
        "mix": partial(ours, "mix", "product", 2, **frame),
        "update": partial(ours, "update", "product", 2, **frame),
        "folded": partial(folded, device, tokens, dim, width),
        "project": partial(project, device, tokens, dim, width),
    }


def main(arguments=None):
    """Exit status 1 if a call raised; the other calls are made too."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report.profiled", description=__doc__.split(":")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="few tokens and channels")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="calls to leave out")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        cuda = torch.cuda.cudart()
        start, stop, wait = cuda.cudaProfilerStart, cuda.cudaProfilerStop, torch.cuda.synchronize
    else:
        start = stop = wait = lambda: None
    failed = False
    for name, make in calls(options.device, options.small).items():
        if name in options.without:
            continue
        try:
            call = make()
            if call is None:
                continue
            call()
            wait()
            start()
            call()
            wait()
            stop()
            print(f"profiled {name}", flush=True)
        except Exception as error:  # noqa: BLE001 -- the others may have what this one lacks
            failed = True
            print(f"not profiled: {name}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
