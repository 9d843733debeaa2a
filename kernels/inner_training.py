"""The C engine of meta-learning an activation: inner_training.c behind checks of all that is handed to it."""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import build

SOURCE = Path(__file__).with_name("inner_training.c")
TYPES = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class InnerTraining:
    """inner_training.c for networks and batches of one size. Raises build.Unavailable without a compiler."""

    def __init__(self, inputs, hidden, classes, examples):
        self.sizes = {"INPUTS": inputs, "HIDDEN": hidden, "CLASSES": classes, "EXAMPLES": examples}
        self.length, self.parameters = -(-examples // 8) * 8, hidden * (inputs + 1) + classes * (hidden + 1)
        library, integer, number, address = build.library(SOURCE, self.sizes), *TYPES
        self._train, self._interpolate = library.train_and_differentiate, library.interpolate
        self._train.argtypes = [integer] * 4 + [number] * 5 + [address] * 10
        self._interpolate.argtypes = [integer] * 3 + [number] * 2 + [address] * 4

    def interpolate(self, coefficients, grid, points):
        """Values and slopes (replicas, ...) of curves (replicas, cells, 4) at points (replicas, ...)."""
        replicas, cells = coefficients.shape[:2]
        shapes = {
            "coefficients": (coefficients, (replicas, cells, 4)),
            "points": (points, (replicas, *points.shape[1:])),
        }
        _check(shapes)
        values, slopes = torch.empty_like(points), torch.empty_like(points)
        addresses = [tensor.data_ptr() for tensor in (coefficients, points, values, slopes)]
        self._interpolate(replicas, points[0].numel(), cells, *grid, *addresses)
        return values, slopes

    def pad(self, signals, labels):
        """Signals (batches, inputs, n) and labels (batches, n), filled up to whole vectors of 8 examples."""
        more = self.length - self.sizes["EXAMPLES"]
        signals, labels = F.pad(signals, (0, more)), F.pad(labels, (0, more), value=-1)
        return signals.contiguous(), labels.to(torch.int32).contiguous()

    def differentiate(self, coefficients, grid, signals, labels, shifts, initial, late, lr, keep, epsilon):
        """Train one network: its losses (steps,), its last parameters, and the gradient of the mean of the
        last `late` losses with respect to the coefficients (cells, 4) and to a constant of each step.

        `grid` is where the cells begin, and how many are in a unit. `shifts` is (steps, hidden); `initial` is
        one vector. All are float32, contiguous and on the CPU, and labels int32, or a ValueError says which.
        """
        steps, cells, batches = len(shifts), len(coefficients), len(signals)
        shapes = {
            "coefficients": (coefficients, (cells, 4)),
            "signals": (signals, (batches, self.sizes["INPUTS"], self.length)),
            "labels": (labels, (batches, self.length)),
            "shifts": (shifts, (steps, self.sizes["HIDDEN"])),
            "initial": (initial, (self.parameters,)),
        }
        _check(shapes)
        if labels.max() >= self.sizes["CLASSES"] or not 0 < late <= steps:
            raise ValueError(f"a label is not below {self.sizes['CLASSES']}, or late not in 1 to {steps}")
        tape, last = torch.empty(steps, 3, self.parameters), torch.empty(self.parameters)
        losses, of_constants, of_coefficients = torch.empty(steps), torch.empty(steps), torch.zeros(cells, 4)
        written = tape, losses, last, of_coefficients, of_constants
        addresses = [tensor.data_ptr() for tensor, _ in shapes.values()] + [t.data_ptr() for t in written]
        self._train(steps, late, batches, cells, *grid, lr, keep, epsilon, *addresses)
        return losses, last, of_coefficients, of_constants


def _check(shapes):
    """ValueError unless each tensor (name -> tensor, shape) is one whose address C may be given."""
    for name, (tensor, shape) in shapes.items():
        dtype = torch.int32 if name == "labels" else torch.float32
        good = tensor.dtype == dtype and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not good or tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: not contiguous {dtype} of {shape} on the CPU")
