"""The C engine of the lottery tickets: sparse_mlp.c behind checks of all that is handed to it."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from kernels import build

SOURCE = Path(__file__).with_name("sparse_mlp.c")
CLASSES = 10
# Measured with 500 hidden units, on a core whose nearest cache is 32 KiB, of which 64 rows fill 26. Blocks
# make a dense matrix 1.15 times as fast, and cost time where less than about a tenth of it is left.
BLOCK = 64
DENSE_ENOUGH = 0.15


class Layer(ctypes.Structure):
    """What sparse_mlp.c knows of a layer."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "columns", "count", "column_blocks", "row_blocks")),
        *((name, ctypes.c_void_p) for name in ("row_start", "column", "column_start", "row", "place")),
        *((name, ctypes.c_void_p) for name in ("weight", "gradient", "mean", "square")),
    ]


def load():
    """The compiled library. Raises build.Unavailable where it cannot be had."""
    library = build.library(SOURCE, {})
    address, integer = ctypes.c_void_p, ctypes.c_int64
    library.train.argtypes = [
        address, address, address, integer, integer, integer, integer, integer, ctypes.c_double, address
    ]  # fmt: skip
    library.evaluate.argtypes = [address, address, address, integer, ctypes.POINTER(integer), address]
    library.tile_size.restype = library.train.restype = integer
    library.evaluate.restype = ctypes.c_double
    return library


library = functools.cache(load)  # whose files need not be looked for again


class Examples:
    """Signals (n, inputs) and labels (n,) in batches of `size`, in tiles as the kernel reads them."""

    def __init__(self, x, y, size):
        n, self.inputs = x.shape
        if y.shape != (n,) or not n or not 0 <= y.min() <= y.max() < CLASSES:
            raise ValueError(f"labels: {y.shape}, not ({n},), or not all from 0 to {CLASSES - 1}")
        if size < 1 or n % size:
            raise ValueError(f"batches of {size} do not divide {n} examples")
        tile = library().tile_size()
        self.n, self.size, self.batches, self.tiles = n, size, n // size, -(-size // tile)
        padded = np.zeros((self.batches, self.tiles * tile, self.inputs), np.float32)
        padded[:, :size] = x.reshape(self.batches, size, self.inputs)
        labels = np.full((self.batches, self.tiles * tile), -1, np.int32)
        labels[:, :size] = y.reshape(self.batches, size)
        self.labels = labels
        self.x = _aligned(self.batches * self.tiles, self.inputs + 1, tile)
        self.x[:, :-1] = padded.reshape(-1, tile, self.inputs).swapaxes(1, 2)
        self.x[:, -1] = 1  # which the biases are multiplied by


class SparseMlp:
    """A residual MLP with the weights that three masks keep, and Adam's state of these.

    `matrices` (hidden, inputs + 1), (hidden, hidden + 1), (10, hidden + 1), float32, have a layer's bias as
    their last column; masks are boolean and of the same shapes.
    """

    def __init__(self, matrices, masks):
        self._library = library()
        shapes = [matrix.shape for matrix in matrices]
        hidden, inputs = shapes[0]
        if shapes != [(hidden, inputs), (hidden, hidden + 1), (CLASSES, hidden + 1)]:
            raise ValueError(f"matrices: {shapes} are not those of a residual MLP")
        self.masks, self._keep, self.steps = [np.array(mask) for mask in masks], [], 0
        self._layers = (Layer * 3)()
        for layer, matrix, mask in zip(self._layers, matrices, self.masks, strict=True):
            if mask.dtype != bool or mask.shape != matrix.shape or matrix.dtype != np.float32:
                raise ValueError(
                    f"mask {mask.dtype} {mask.shape} of a matrix {matrix.dtype} {matrix.shape}: "
                    "not bool of float32, or not the same shape"
                )
            order = _order(mask)
            rows, columns = order.pop("rows"), order.pop("columns")
            layer.column_blocks, layer.row_blocks = order.pop("column_blocks"), order.pop("row_blocks")
            arrays = {name: np.ascontiguousarray(array, np.int32) for name, array in order.items()}
            arrays["weight"] = matrix[rows, columns]
            arrays |= {name: np.zeros(len(rows), np.float32) for name in ("gradient", "mean", "square")}
            layer.rows, layer.columns, layer.count = mask.shape[0], mask.shape[1] - 1, len(rows)
            for name, array in arrays.items():
                setattr(layer, name, array.ctypes.data)
            self._keep.append(((rows, columns), arrays))
        self._workspace = _aligned(6 * hidden + 4 + CLASSES, self._library.tile_size())

    def train(self, examples, steps, lr):
        """The next updates, each on the next batch in order. FloatingPointError if a loss is not finite."""
        self._require(examples)
        not_finite = self._library.train(
            self._layers, examples.x.ctypes.data, examples.labels.ctypes.data, examples.batches,
            examples.tiles, examples.size, self.steps, steps, lr, self._workspace.ctypes.data,
        )  # fmt: skip
        self.steps += steps
        if not_finite:
            raise FloatingPointError("a loss is not finite")

    def evaluate(self, examples):
        """The mean loss over all examples, and how many are missed."""
        self._require(examples)
        misses = ctypes.c_int64()
        loss = self._library.evaluate(
            self._layers, examples.x.ctypes.data, examples.labels.ctypes.data,
            examples.batches * examples.tiles, ctypes.byref(misses), self._workspace.ctypes.data,
        )  # fmt: skip
        return loss / examples.n, misses.value

    def matrices(self, of="weight"):
        """The three matrices, with 0 for what was removed; also of Adam's `mean` and `square`."""
        found = [np.zeros(mask.shape, np.float32) for mask in self.masks]
        for matrix, (where, arrays) in zip(found, self._keep):
            matrix[where] = arrays[of]
        return found

    def _require(self, examples):
        if examples.inputs != self._layers[0].columns:
            raise ValueError(f"{examples.inputs} inputs and not {self._layers[0].columns}")


def _order(mask):
    """The weights that a mask keeps, in the two orders that sparse_mlp.c reads them in, by its names."""
    rows, columns = np.nonzero(mask)
    block = BLOCK if len(rows) > DENSE_ENOUGH * mask.size else max(mask.shape)
    order = np.lexsort((columns, rows, columns // block))  # the last key is the first to sort by
    rows, columns = rows[order], columns[order]
    place = np.lexsort((rows, columns, rows // block))
    column_blocks, row_blocks = (-(-size // block) for size in mask.shape[::-1])
    by_rows = columns // block * mask.shape[0] + rows
    by_columns = rows[place] // block * mask.shape[1] + columns[place]
    return {
        "rows": rows,
        "columns": columns,
        "column_blocks": column_blocks,
        "row_blocks": row_blocks,
        "row_start": _starts(by_rows, column_blocks * mask.shape[0]),
        "column": columns,
        "column_start": _starts(by_columns, row_blocks * mask.shape[1]),
        "row": rows[place],
        "place": place,
    }


def _starts(indices, count):
    """Where each of `count` numbers begins in the sorted indices, and the end."""
    return np.concatenate([[0], np.cumsum(np.bincount(indices, minlength=count))])


def _aligned(*shape):
    """Zeros whose address is a multiple of 64 bytes, as vectors need it."""
    size = int(np.prod(shape))
    padded = np.zeros(size + 16, np.float32)
    first = -padded.ctypes.data % 64 // 4
    return padded[first : first + size].reshape(shape)
