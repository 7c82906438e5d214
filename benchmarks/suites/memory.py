"""Peak memory of operations and layers on the CPU: all cases by name, with their baselines and their targets."""

from ..harness import checked
from ..harness.layer_case import LayerCase
from ..harness.measure import Target
from ..harness.memory_case import MemoryCase
from ..harness.op_case import OpCase

FORMS = (("power", 3, 8), ("product", 2, 1))  # form, degree of the operation, heads of the layer
FEW_STATES = (Target("state", at_most=128),)  # extra memory in multiples of the state, for any number of tokens
LENGTHS = (4096, 32768)


def cases():
    for form, _, heads in FORMS:
        for tokens in LENGTHS:
            yield MemoryCase(LayerCase(form, 3, tokens, heads=heads), targets=(Target("allowed", at_most=1),))
    for form, degree, _ in FORMS:
        for tokens in LENGTHS:
            yield MemoryCase(OpCase("state", form, degree, tokens), targets=FEW_STATES)


CASES = {"cpu": {case.name: case for case in cases()}}


def main(arguments=None):
    return checked.run("memory", CASES, arguments)
