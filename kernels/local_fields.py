"""The C engine of local receptive fields: local_fields.c behind checks of all that is handed to it."""

import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import build
from kernels.forward_forward import _check

SOURCE = Path(__file__).with_name("local_fields.c")
SIDE, MAPS, FIELD, TILES, TILE_INPUTS, TILE_UNITS = 32, 3, 11, 64, 14 * 14 * 3, 4 * 4 * 3
PADDED, TILE_ROW = SIDE + FIELD - 1, 14 * 3


class FieldKernels:
    """Products with local fields, compiled. Without a compiler: build.Unavailable.

    `dtype`, float32 or bfloat16, is that of x, d, weights and results. Tensors are on the CPU and contiguous,
    or a ValueError says which is not. studies.ff_cifar.TorchFields has the same methods, and says what they
    compute.
    """

    def __init__(self, dtype, target=None):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype {dtype} is neither float32 nor bfloat16")
        self.dtype = dtype
        library = build.library(SOURCE, {"BF16": int(dtype == torch.bfloat16)}, target)
        address, integer = ctypes.c_void_p, ctypes.c_int64
        self._products, self._outer, self._back = library.products, library.outer, library.back
        self._products.argtypes = [address, address, integer, address]
        self._outer.argtypes = [address, address, integer, address, address]
        self._back.argtypes = [address, address, integer, address]
        for function in (self._products, self._outer, self._back):
            function.restype = None

    def see(self, x):
        """What the tiles see: x with a border of zeros (n, 42, 42, 3)."""
        _check("x", x, self.dtype, (len(x), SIDE * SIDE * MAPS))
        reach = FIELD // 2
        return F.pad(x.view(-1, SIDE, SIDE, MAPS), (0, 0, reach, reach, reach, reach))

    def products(self, seen, weights):
        self._check_seen(seen)
        _check("weights", weights, self.dtype, (TILES, TILE_INPUTS, TILE_UNITS))
        out = torch.empty(len(seen), SIDE * SIDE * MAPS, dtype=self.dtype)
        self._products(seen.data_ptr(), weights.data_ptr(), len(seen), out.data_ptr())
        return out

    def outer(self, seen, d):
        self._check_seen(seen)
        _check("d", d, self.dtype, (len(seen), SIDE * SIDE * MAPS))
        gradient = torch.empty(TILES, TILE_INPUTS, TILE_UNITS, dtype=self.dtype)
        cells = PADDED * PADDED * MAPS + SIDE * SIDE * MAPS + TILE_ROW + TILE_UNITS  # of an example, at most
        scratch = torch.empty(len(d) * cells, dtype=torch.int32)
        self._outer(seen.data_ptr(), d.data_ptr(), len(d), scratch.data_ptr(), gradient.data_ptr())
        return gradient

    def back(self, d, weights):
        _check("d", d, self.dtype, (len(d), SIDE * SIDE * MAPS))
        _check("weights", weights, self.dtype, (TILES, TILE_INPUTS, TILE_UNITS))
        gradient = torch.zeros(len(d), SIDE * SIDE * MAPS)
        self._back(d.data_ptr(), weights.data_ptr(), len(d), gradient.data_ptr())
        return gradient

    def _check_seen(self, seen):
        _check("seen", seen, self.dtype, (len(seen), PADDED, PADDED, MAPS))
