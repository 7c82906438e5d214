"""The operations that torch is asked for."""

from torch.utils._python_dispatch import TorchDispatchMode


class RecordCalls(TorchDispatchMode):
    """Keeps the calls of this package's operations, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "pom_ext":
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))
