"""The C engine of the 1989 network: convnet1989.c behind checks of all that is handed to it."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from kernels import build

SOURCE = Path(__file__).with_name("convnet1989.c")
SHAPES = {
    "H1w": (12, 1, 5, 5),
    "H1b": (12, 8, 8),
    "H2w": (12, 8, 5, 5),
    "H2b": (12, 4, 4),
    "H3w": (192, 30),
    "H3b": (30,),
    "outw": (30, 10),
    "outb": (10,),
}
VARIANTS = {
    "loss": ("mse", "cross_entropy"),
    "activation": ("tanh", "scaled_tanh", "relu"),
    "optimizer": ("sgd", "sgd_rates", "adamw"),
    "shift": ("none", "roll", "pad"),
}


class State(ctypes.Structure):
    """What a replica's optimiser and chance depend on, from pass to pass. AdamW's defaults are PyTorch's."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("presentations", ctypes.c_uint64),  # so far
        ("beta1_power", ctypes.c_double),
        ("beta2_power", ctypes.c_double),
        ("lr", ctypes.c_double),
        ("beta1", ctypes.c_double),
        ("beta2", ctypes.c_double),
        ("epsilon", ctypes.c_double),
        ("weight_decay", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("shift_pixels", ctypes.c_uint64),
    ]

    def __init__(
        self, seed=0, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, dropout=0.25, shift_pixels=1
    ):
        if not (0 <= seed < 2**64 and 0 <= dropout < 1 and 0 <= shift_pixels < 16):
            raise ValueError(
                f"seed {seed} is not in [0, 2^64), dropout {dropout} not in [0, 1), "
                f"or shift_pixels {shift_pixels} not in [0, 16)"
            )
        super().__init__(seed, 0, 1, 1, 0, beta1, beta2, epsilon, weight_decay, dropout, shift_pixels)


class Convnet1989:
    """One variant of the network, compiled: build.Unavailable where that cannot be done.

    `reads` (12, 8) are the maps of H1 that each map of H2 reads, in the order of its weights; without it, the
    three blocks of repro.py, which are faster. Parameters are eight arrays in the order and the shapes of
    `SHAPES`; images (n, 1, 20, 20) have their border on. All arrays are float32 and contiguous, or a
    ValueError says which is not.
    """

    def __init__(
        self,
        loss="mse",
        activation="tanh",
        optimizer="sgd",
        shift="none",
        dropout=False,
        batch_size=1,
        reads=None,
        target=None,
    ):
        chosen = {"loss": loss, "activation": activation, "optimizer": optimizer, "shift": shift}
        for name, value in chosen.items():
            if value not in VARIANTS[name]:
                raise ValueError(f"{name} {value!r} is none of {', '.join(VARIANTS[name])}")
        if not (isinstance(batch_size, int) and batch_size >= 1):
            raise ValueError(f"batch_size {batch_size!r} is not a whole number of at least 1")
        defines = {name.upper(): value.upper() for name, value in chosen.items()}
        if reads is not None:
            reads = np.ascontiguousarray(reads, np.int32)
            if reads.shape != (12, 8) or not ((reads >= 0) & (reads < 12)).all():
                raise ValueError(f"reads: {reads.tolist()} are not 8 of the maps 0 to 11 for each of 12")
        defines |= {"DROPOUT": int(dropout), "BATCH": int(batch_size > 1)}
        defines |= {"SCHEME": "BLOCKS" if reads is None else "ANY", "CURVATURE": 0}
        library = build.library(SOURCE, defines, target)
        self._defines, self._target, self._reads = defines, target, reads
        self.lanes = library.lanes()  # floats in a vector: 16 with AVX-512, else 8
        self._optimizer, self._batch_size = optimizer, batch_size
        self._needs_state = optimizer == "adamw" or shift != "none" or dropout
        pointers, address, integer = ctypes.c_void_p * 8, ctypes.c_void_p, ctypes.c_int64
        self._train_pass, self._compute_outputs = library.train_pass, library.compute_outputs
        self._train_pass.argtypes = [
            pointers, pointers, pointers, address, address, integer, integer, address, ctypes.POINTER(State)
        ]  # fmt: skip
        self._compute_outputs.argtypes = [pointers, address, integer, address, address]
        self._compute_outputs.restype = None

    def train_pass(self, parameters, images, targets, lr, *, moments=None, state=None):
        """Present every image once, in order, and step after each batch; parameters change in place.

        targets (n, 10); `lr` is a number, for sgd_rates eight arrays like the parameters; `moments`: for
        adamw, two such eights, 0 at first, which change in place; `state`: for adamw, and where something is
        random, a State to be used again in the next call. FloatingPointError if a parameter is no longer
        finite.
        """
        n = len(images)
        parameters = _eight(parameters, "parameters", written=True)
        extra1 = extra2 = ()
        if self._optimizer == "sgd_rates":
            extra1, lr = _eight(lr, "rates"), 0.0
        if self._optimizer == "adamw":
            extra1, extra2 = (_eight(each, "moments", written=True) for each in moments or (None, None))
        if self._needs_state and state is None:
            raise ValueError("state: this variant needs one")
        state = State() if state is None else state
        state.lr = lr
        not_finite = self._train_pass(
            _addresses(parameters),
            _addresses(extra1),
            _addresses(extra2),
            _check(images, (n, 1, 20, 20), "images").ctypes.data,
            _check(targets, (n, 10), "targets").ctypes.data,
            n,
            self._batch_size,
            self._address_of_reads(),
            ctypes.byref(state),
        )
        if not_finite:
            raise FloatingPointError("a parameter is no longer finite")

    def compute_outputs(self, parameters, images):
        """The outputs (n, 10), float32, for n images; of cross_entropy, the logits."""
        n = len(images)
        parameters = _eight(parameters, "parameters")
        outputs = np.empty((n, 10), np.float32)
        address = _check(images, (n, 1, 20, 20), "images").ctypes.data
        self._compute_outputs(
            _addresses(parameters), address, n, self._address_of_reads(), outputs.ctypes.data
        )
        return outputs

    def measure_curvature(self, parameters, images):
        """The diagonal of the mean squared error's Gauss-Newton matrix over n images: eight arrays.

        Connections that share a weight are added, without the terms between them (LeCun et al. 1998,
        appendix C).
        """
        n = len(images)
        parameters = _eight(parameters, "parameters")
        diagonal = [np.empty(shape, np.float32) for shape in SHAPES.values()]
        address = _check(images, (n, 1, 20, 20), "images").ctypes.data
        self._curvature_function(
            _addresses(parameters), address, n, self._address_of_reads(), _addresses(diagonal)
        )
        return [array / n for array in diagonal]

    @functools.cached_property
    def _curvature_function(self):
        library = build.library(SOURCE, {**self._defines, "CURVATURE": 1}, self._target)
        function, pointers, address = library.measure_curvature, ctypes.c_void_p * 8, ctypes.c_void_p
        function.argtypes, function.restype = [pointers, address, ctypes.c_int64, address, pointers], None
        return function

    def _address_of_reads(self):
        return None if self._reads is None else self._reads.ctypes.data


def _addresses(arrays):
    """Of eight arrays, which have to outlive them; NULL where there are none."""
    return (ctypes.c_void_p * 8)(*(array.ctypes.data for array in arrays))


def _eight(arrays, what, written=False):
    """The arrays as a tuple, if they are like the parameters."""
    if not isinstance(arrays, (list, tuple)) or len(arrays) != len(SHAPES):
        raise ValueError(f"{what}: not {len(SHAPES)} arrays")
    pairs = zip(arrays, SHAPES.items())
    return tuple(_check(array, shape, f"{name} of the {what}", written) for array, (name, shape) in pairs)


def _check(array, shape, what, written=False):
    """The array, if C may be given its address."""
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{what}: a {type(array).__name__} and not a NumPy array")
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"{what}: {array.dtype} {array.shape} and not float32 {shape}")
    flags = array.flags
    if not flags.c_contiguous or not flags.aligned:
        raise ValueError(f"{what}: not {'aligned' if flags.c_contiguous else 'contiguous'}")
    if written and not flags.writeable:
        raise ValueError(f"{what}: not writable")
    return array
