"""Products of maps with local receptive fields that share no weights, in PyTorch and in C.

A map has 32x32 places of 3 numbers, and a unit sees 11x11 places. studies/ff_cifar.py, whose networks have
such layers, defines them in plain PyTorch. Places that are neighbours see nearly the same, so 4x4 of them
are a tile, and see 14x14 places. The weights of a tile are a matrix of 14*14*3 inputs and 4*4*3 units, in
which all is 0 that a unit does not see; those are 38% of it. A layer is 64 such products.
studies/ff_cifar_speed.py says how long other ways take.
"""

import ctypes
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from kernels import build
from kernels.forward_forward import check_tensor

SOURCE = Path(__file__).with_name("local_fields.c")
SIDE, MAPS, FIELD, TILE = 32, 3, 11, 4
UNITS, FAN_IN, PLACES = SIDE * SIDE * MAPS, FIELD * FIELD * MAPS, SIDE * SIDE
PADDED, PATCH = SIDE + FIELD - 1, TILE + FIELD - 1
TILES, TILE_INPUTS, TILE_UNITS = (SIDE // TILE) ** 2, PATCH * PATCH * MAPS, TILE * TILE * MAPS


def of_fields(tiles):
    """A view of the tiles' matrices, (64, 588, 48) for tiles of 4x4, that has only what units see.

    Its shape is (8, 4, 8, 4, 3, 11, 11, 3): row and column of places, both by tile and within it; map, row
    and column within the field; unit. The next place's weights stand as many inputs and units farther on.
    """
    count, inputs, units = tiles.shape
    side, tile = math.isqrt(count), math.isqrt(units // MAPS)
    row, column = (tile + FIELD - 1) * MAPS * units, MAPS * units
    shape = side, tile, side, tile, MAPS, FIELD, FIELD, MAPS
    down, right = row + tile * MAPS, column + MAPS
    strides = side * inputs * units, down, inputs * units, right, units, row, column, 1
    return tiles.as_strided(shape, strides)


def to_tiles(fields, tile=TILE):
    """The matrices of the tiles that have the weights (1024, 363, 3) in them."""
    tiles = fields.new_zeros((SIDE // tile) ** 2, (tile + FIELD - 1) ** 2 * MAPS, tile**2 * MAPS)
    view = of_fields(tiles)
    view.copy_(fields.view(view.shape))
    return tiles


class TorchFields:
    """Products with local fields, by tiles, in PyTorch; x, weights and d have one dtype, as results have."""

    def __init__(self, device="cpu", tile=TILE):
        self.mask = to_tiles(torch.ones(PLACES, FAN_IN, MAPS), tile).to(device)
        self.tile, self.tiles, self.patch = tile, SIDE // tile, tile + FIELD - 1  # in one direction

    def see(self, x):
        """What the tiles see (64, n, 588) of x (n, 3072)."""
        n, reach = len(x), FIELD // 2
        padded = F.pad(x.view(n, SIDE, SIDE, MAPS), (0, 0, reach, reach, reach, reach))
        image, row, column, _ = padded.stride()
        shape = self.tiles, self.tiles, n, self.patch, self.patch * MAPS
        patches = padded.as_strided(shape, (self.tile * row, self.tile * column, image, row, 1))
        return patches.reshape(self.tiles**2, n, -1)

    def products(self, seen, weights):
        """The products (n, 3072) of what `see` returned and the matrices of the tiles."""
        products = torch.bmm(seen, weights).view(self.tiles, self.tiles, -1, self.tile, self.tile * MAPS)
        return products.permute(2, 0, 3, 1, 4).reshape(-1, UNITS)

    def outer(self, seen, d):
        """The gradient by the weights: products of what is seen and of d (n, 3072), summed over examples."""
        gradient = torch.bmm(seen.transpose(1, 2), self._by_tile(d))
        return gradient.mul_(self.mask.to(gradient.dtype))

    def back(self, d, weights):
        """The gradient by x (n, 3072), float32, of which d (n, 3072) is that by the products."""
        of_patches = torch.bmm(self._by_tile(d), weights.transpose(1, 2))
        of_patches = of_patches.view(self.tiles, self.tiles, len(d), self.patch, self.patch, MAPS)
        padded = torch.zeros(len(d), SIDE + FIELD - 1, SIDE + FIELD - 1, MAPS, device=d.device)
        for row, tiles in zip(range(0, SIDE, self.tile), of_patches):
            for column, own in zip(range(0, SIDE, self.tile), tiles):
                padded[:, row : row + self.patch, column : column + self.patch] += own
        inside = slice(FIELD // 2, FIELD // 2 + SIDE)
        return padded[:, inside, inside].reshape(len(d), UNITS)

    def _by_tile(self, d):
        own = d.view(len(d), self.tiles, self.tile, self.tiles, self.tile * MAPS)
        return own.permute(1, 3, 0, 2, 4).reshape(self.tiles**2, len(d), -1)


class FieldKernels:
    """Products with local fields, compiled. Without a compiler: build.Unavailable.

    `dtype`, float32 or bfloat16, is that of x, d, weights and results. Tensors are on the CPU and contiguous,
    or a ValueError says which is not. TorchFields has the same methods, and says what they compute.
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
        check_tensor("x", x, self.dtype, (len(x), UNITS))
        reach = FIELD // 2
        return F.pad(x.view(-1, SIDE, SIDE, MAPS), (0, 0, reach, reach, reach, reach))

    def products(self, seen, weights):
        self._check_seen(seen)
        check_tensor("weights", weights, self.dtype, (TILES, TILE_INPUTS, TILE_UNITS))
        out = torch.empty(len(seen), UNITS, dtype=self.dtype)
        self._products(seen.data_ptr(), weights.data_ptr(), len(seen), out.data_ptr())
        return out

    def outer(self, seen, d):
        self._check_seen(seen)
        check_tensor("d", d, self.dtype, (len(seen), UNITS))
        gradient = torch.empty(TILES, TILE_INPUTS, TILE_UNITS, dtype=self.dtype)
        cells = PADDED * PADDED * MAPS + UNITS + PATCH * MAPS + TILE_UNITS  # of an example, at most
        scratch = torch.empty(len(d) * cells, dtype=torch.int32)
        self._outer(seen.data_ptr(), d.data_ptr(), len(d), scratch.data_ptr(), gradient.data_ptr())
        return gradient

    def back(self, d, weights):
        check_tensor("d", d, self.dtype, (len(d), UNITS))
        check_tensor("weights", weights, self.dtype, (TILES, TILE_INPUTS, TILE_UNITS))
        gradient = torch.zeros(len(d), UNITS)
        self._back(d.data_ptr(), weights.data_ptr(), len(d), gradient.data_ptr())
        return gradient

    def _check_seen(self, seen):
        check_tensor("seen", seen, self.dtype, (len(seen), PADDED, PADDED, MAPS))
