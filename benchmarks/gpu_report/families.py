"""The families of kernels, and what later steps leave out if a family fails in the smoke step."""

from dataclasses import dataclass

LAYERS = ("layer*",)
TRAINING = ("layer_train*", "layer_recompute*")


@dataclass(frozen=True)
class Family:
    """The tests and measurements that need its kernels."""

    tests: tuple = ()  # expressions of pytest's -k
    cases: tuple = ()  # patterns of the benchmark's cases
    parts: tuple = ()  # of tests/sanitized.py
    calls: tuple = ()  # of profiled.py


SUMS = ("whole", "weight", "frames", "frames_unequal", "cu_seqlens")
FAMILIES = {
    "state": Family(("test_state",), ("state-*", "weighted_state-*", *LAYERS), SUMS, ("state", "state_product")),
    "readout": Family(("test_readout",), ("readout-*", *LAYERS), SUMS, ("readout",)),
    "mix": Family(("test_mix", "test_autocast"), ("mix-*", *LAYERS), SUMS, ("mix",)),
    "causal": Family(("causal",), ("causal_mix*",), ("causal",), ("causal_mix",)),
    "state_backward": Family(
        ("test_mix", "derivatives", "grad", "training"),
        ("state_*", "weighted_state_*", *TRAINING),
        ("backward",),
        ("state_backward",),
    ),
    "readout_backward": Family(
        ("test_mix", "derivatives", "grad", "training"), ("readout_backward*", *TRAINING), ("backward",)
    ),
    "mix_backward": Family(("test_mix", "derivatives", "grad", "training"), ("mix_*", *TRAINING), ("backward",)),
    "causal_backward": Family(
        ("causal",), ("causal_mix_*",), ("backward",), ("causal_mix_backward",)
    ),
    "update": Family(("test_update", "stream", "play"), ("update-*",), ("update",), ("update",)),
    "mask": Family(("mask",), (), ("mask",)),
    "folded": Family(("folded", "readouts_take"), LAYERS, ("folded",), ("folded",)),
    "project": Family(("(at_once and state)",), (), ("project",), ("project",)),
}  # fmt: skip
LAST = "project"  # runs after all others: the newest kernel is the most likely to hang


def needing(failed, what):
    """Sorted and unique: the tests, cases, parts or calls (`what`) that need one of these families."""
    return sorted({word for family in failed for word in getattr(FAMILIES[family], what)})
