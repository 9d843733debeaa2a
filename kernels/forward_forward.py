"""The C engine of Forward-Forward: forward_forward.c behind checks of all that is handed to it."""

import ctypes
from pathlib import Path

import torch

from kernels import build

SOURCE = Path(__file__).with_name("forward_forward.c")
LABELS = 10


class Kernels:
    """What Forward-Forward does between its matrix products, compiled. Without a compiler: build.Unavailable.

    `dtype`, float32 or bfloat16, is that of products, activities, gradients and weights_lowp. All else is
    float32, and labels are int64. Tensors are on the CPU and contiguous, or a ValueError says which is not.
    forward_forward.TorchOps has the same methods, and says what they compute.
    """

    def __init__(self, dtype, target=None):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is neither float32 nor bfloat16")
        self.dtype = dtype
        library = build.library(SOURCE, {"BF16": int(dtype == torch.bfloat16)}, target)
        address, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._activate, self._update, self._shift = library.activate, library.update, library.shift
        self._activate.argtypes = [
            address, integer, address, address, integer, integer, integer, address, integer, real,
            address, address, address,
        ]  # fmt: skip
        self._update.argtypes = [address, address, address, address, integer, integer, real, real, real, real]
        self._shift.argtypes = [address, integer, integer, address, address, integer, address]
        for function in (self._activate, self._update, self._shift):
            function.restype = None

    def activate(self, products, added, labels, linear=False, keys=None, dropout=0.0):
        m, width = _shape("products", products, 2)
        n, single = len(labels), torch.float32
        h, passed_on = torch.empty(n, width, dtype=self.dtype), torch.empty(n, width, dtype=self.dtype)
        goodness = torch.empty(n)
        check_tensor("products", products, self.dtype, (m, width))
        check_tensor("added", added, single, (len(added), width))
        check_tensor("labels", labels, torch.int64, (n,))
        if n and not (m and 0 <= int(labels.min()) <= int(labels.max()) < len(added)):
            raise ValueError(f"labels: not all from 0 to {len(added) - 1}, or there are no products")
        if keys is not None:
            check_tensor("keys", keys, torch.int64, (n,))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: {dropout} is not from 0 to below 1")
        self._activate(
            products.data_ptr(), m, added.data_ptr(), labels.data_ptr(), n, width, int(linear),
            keys.data_ptr() if keys is not None else None, int(dropout * 2**32), 1 / (1 - dropout),
            h.data_ptr(), passed_on.data_ptr(), goodness.data_ptr(),
        )  # fmt: skip
        return h, passed_on, goodness

    def update(self, weights, velocity, weights_lowp, gradients, scale, momentum, lr, weight_decay):
        (n,), single = _shape("weights", weights, 1), torch.float32
        check_tensor("weights", weights, single, (n,))
        check_tensor("velocity", velocity, single, (n,))
        check_tensor("weights_lowp", weights_lowp, self.dtype, (n,))
        for gradient in gradients:
            check_tensor("gradient", gradient, self.dtype, (n,))
        if not gradients:
            raise ValueError("gradients: there are none")
        addresses = (ctypes.c_void_p * len(gradients))(*(gradient.data_ptr() for gradient in gradients))
        self._update(
            weights.data_ptr(), velocity.data_ptr(), weights_lowp.data_ptr(), addresses, len(gradients), n,
            scale, momentum, lr, weight_decay,
        )  # fmt: skip

    def shift(self, images, chosen, shifts):
        count, height, width = _shape("images", images, 3)
        n = len(chosen)
        check_tensor("images", images, self.dtype, (count, height, width))
        check_tensor("chosen", chosen, torch.int64, (n,))
        check_tensor("shifts", shifts, torch.int64, (n, 2))
        if n and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
            raise ValueError(f"chosen: not all from 0 to {count - 1}")
        if height * width < LABELS:
            raise ValueError(f"images: {height}x{width} has no room for {LABELS} labels")
        shifted = torch.empty(n, height * width, dtype=self.dtype)
        self._shift(
            images.data_ptr(), height, width, chosen.data_ptr(), shifts.data_ptr(), n, shifted.data_ptr()
        )
        return shifted


def _shape(what, tensor, rank):
    """The tensor's shape, if it has so many dimensions."""
    if tensor.dim() != rank:
        raise ValueError(f"{what}: {tensor.dim()} dimensions and not {rank}")
    return tensor.shape


def check_tensor(what, tensor, dtype, shape):
    """Raise ValueError unless C may be given the tensor's address."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what}: {tensor.dtype} {tuple(tensor.shape)} and not {dtype} {tuple(shape)}")
    if not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(f"{what}: not contiguous, or not on the CPU")
