"""The C engine of small convnets whose forgetting is counted: convnet_sgd.c behind checks of its input."""

import ctypes
import functools
from pathlib import Path

import torch

from kernels import build

SOURCE = Path(__file__).with_name("convnet_sgd.c")
CLASSES, KERNEL = 10, 5


@functools.cache
def load(side=28, inputs=1, maps1=10, maps2=20, hidden=50, target=None):
    """The library for networks of these sizes. Raises build.Unavailable where it cannot be had."""
    defines = {"SIDE": side, "INPUTS": inputs, "MAPS1": maps1, "MAPS2": maps2, "HIDDEN": hidden}
    library = build.library(SOURCE, defines, target)
    address, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.workspace_size.restype = library.parameter_count.restype = integer
    library.present.restype = ctypes.c_double
    library.present.argtypes = [
        address, address, address, address, address, integer, integer, real, real, address, address
    ]  # fmt: skip
    return library


class Convnet:
    """A network for images (n, inputs, side, side), with SGD's velocities; its steps are those of C.

    `parameters`: name -> float32 tensor, weights before biases, layer by layer, shaped as PyTorch has them.
    studies.myth4_forgetting.TorchConvnet has the same methods, and says what they compute.
    """

    def __init__(self, parameters, side, lr, momentum, target=None):
        shapes = [tuple(tensor.shape) for tensor in parameters.values()]
        (maps1, inputs, *_), (maps2, *_), (hidden, _) = shapes[0], shapes[2], shapes[4]
        pooled = ((side - KERNEL + 1) // 2 - KERNEL + 1) // 2
        if maps1 % 10 or maps2 % 10 or hidden % 5 or side % 4:
            raise ValueError(
                f"{maps1} and {maps2} maps, {hidden} units: not in tens, or {side} is not in fours"
            )
        expected = [
            (maps1, inputs, KERNEL, KERNEL), (maps1,), (maps2, maps1, KERNEL, KERNEL), (maps2,),
            (hidden, maps2 * pooled * pooled), (hidden,), (CLASSES, hidden), (CLASSES,),
        ]  # fmt: skip
        if shapes != expected:
            raise ValueError(f"parameters: {shapes} and not {expected}")
        self._library = load(side, inputs, maps1, maps2, hidden, target)
        self._shapes, self.lr, self.momentum = dict(zip(parameters, shapes)), lr, momentum
        self._image = inputs, side, side
        self._parameters = _aligned(self._library.parameter_count())
        self._parameters.copy_(torch.cat([tensor.detach().flatten() for tensor in parameters.values()]))
        self._velocity = _aligned(len(self._parameters))
        self._workspace = _aligned(self._library.workspace_size() // 4)

    def present(self, images, labels, order, batch):
        """Whether each example was right when presented, and the mean loss; batch = 0: without steps."""
        if not images.is_contiguous() or images.dtype != torch.float32 or images.shape[1:] != self._image:
            raise ValueError(f"images: not contiguous float32 of {self._image}")
        for name, tensor, bound in ("labels", labels, CLASSES), ("order", order, len(images)):
            if not tensor.is_contiguous() or tensor.dtype != torch.int64 or not len(tensor):
                raise ValueError(f"{name}: not contiguous int64, or empty")
            if not 0 <= tensor.min() <= tensor.max() < bound:
                raise ValueError(f"{name}: not all from 0 to {bound - 1}")
        if len(labels) != len(images) or batch < 0:
            raise ValueError(f"{len(labels)} labels of {len(images)} images, or a batch of {batch}")
        right = torch.empty(len(order), dtype=torch.bool)
        loss = self._library.present(
            self._parameters.data_ptr(), self._velocity.data_ptr(), images.data_ptr(), labels.data_ptr(),
            order.data_ptr(), len(order), batch, self.lr, self.momentum, right.data_ptr(),
            self._workspace.data_ptr(),
        )  # fmt: skip
        return right, loss / len(order)

    def parameters(self):
        """name -> tensor, copies."""
        return self._named(self._parameters)

    def velocities(self):
        """name -> tensor, copies."""
        return self._named(self._velocity)

    def _named(self, flat):
        parts = flat.split([torch.Size(shape).numel() for shape in self._shapes.values()])
        return {name: part.view(self._shapes[name]).clone() for name, part in zip(self._shapes, parts)}


def _aligned(size):
    """Float32 zeros whose address is a multiple of 64 bytes, as vectors need it."""
    padded = torch.zeros(size + 16)
    first = -padded.data_ptr() % 64 // 4
    return padded[first : first + size]
