"""The C engine of the 1989 network: convnet1989.c behind checks of all that is handed to it."""

import ctypes
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
}


class State(ctypes.Structure):
    """What a replica's optimiser and chance depend on, from pass to pass. AdamW's defaults are PyTorch's."""

    _fields_ = [
        ("seed", ctypes.c_uint64),
        ("presentations", ctypes.c_uint64),  # so far
        ("beta1_power", ctypes.c_double),
        ("beta2_power", ctypes.c_double),
        ("lr", ctypes.c_float),
        ("beta1", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("weight_decay", ctypes.c_float),
        ("dropout", ctypes.c_float),
    ]

    def __init__(self, seed=0, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01, dropout=0.25):
        super().__init__(seed, 0, 1, 1, 0, beta1, beta2, epsilon, weight_decay, dropout)


class Convnet1989:
    """One variant of the network, compiled: build.Unavailable where that cannot be done.

    Parameters are eight arrays in the order and the shapes of `SHAPES`; images (n, 1, 20, 20) have their
    border on. All arrays are float32 and contiguous, or a ValueError says which is not.
    """

    def __init__(
        self, loss="mse", activation="tanh", optimizer="sgd", shift=False, dropout=False, target=None
    ):
        chosen = {"loss": loss, "activation": activation, "optimizer": optimizer}
        for name, value in chosen.items():
            if value not in VARIANTS[name]:
                raise ValueError(f"{name} {value!r} is none of {', '.join(VARIANTS[name])}")
        defines = {name.upper(): value.upper() for name, value in chosen.items()}
        defines |= {"SHIFT": int(shift), "DROPOUT": int(dropout)}
        library = build.library(SOURCE, defines, target)
        self.lanes = library.lanes()  # floats in a vector: 16 with AVX-512, else 8
        self._optimizer = optimizer
        pointers, address = ctypes.c_void_p * 8, ctypes.c_void_p
        self._train_pass, self._compute_outputs = library.train_pass, library.compute_outputs
        self._train_pass.argtypes = [
            pointers, pointers, pointers, address, address, ctypes.c_int64, ctypes.POINTER(State)
        ]  # fmt: skip
        self._compute_outputs.argtypes = [pointers, address, ctypes.c_int64, address]

    def train_pass(self, parameters, images, targets, lr=0.0, *, rates=None, moments=None, state=None):
        """Present every image once, in order, and step after each; parameters change in place.

        targets (n, 10); `rates`: of sgd_rates, eight arrays like the parameters, used in the place of `lr`;
        `moments`: of adamw, two such eights, 0 at first, which change in place; `state`: a State, if the
        variant is adamw or draws chance. FloatingPointError if a parameter is no longer finite.
        """
        n = len(images)
        state = State() if state is None else state
        state.lr = lr
        needed = {"sgd": (), "sgd_rates": (rates,), "adamw": moments or (None, None)}[self._optimizer]
        if None in needed:
            raise ValueError(f"{self._optimizer} needs its {'rates' if len(needed) == 1 else 'moments'}")
        extra1, extra2 = (*needed, None, None)[:2]
        not_finite = self._train_pass(
            _pointers(parameters, "parameters", written=True),
            _pointers(extra1, "rates or first moments", written=True),
            _pointers(extra2, "second moments", written=True),
            _pointer(images, (n, 1, 20, 20), "images"),
            _pointer(targets, (n, 10), "targets"),
            n,
            ctypes.byref(state),
        )
        if not_finite:
            raise FloatingPointError("a parameter is no longer finite")

    def compute_outputs(self, parameters, images):
        """The outputs (n, 10), float32, for n images; of cross_entropy, the logits."""
        n = len(images)
        outputs = np.empty((n, 10), np.float32)
        self._compute_outputs(
            _pointers(parameters, "parameters"),
            _pointer(images, (n, 1, 20, 20), "images"),
            n,
            _pointer(outputs, (n, 10), "outputs"),
        )
        return outputs


def _pointers(arrays, what, written=False):
    if arrays is None:
        return (ctypes.c_void_p * 8)()
    return (ctypes.c_void_p * 8)(
        *(
            _pointer(array, shape, f"{name} of the {what}", written)
            for array, (name, shape) in zip(arrays, SHAPES.items(), strict=True)
        )
    )


def _pointer(array, shape, what, written=False):
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{what}: a {type(array).__name__} and not a NumPy array")
    if array.dtype != np.float32 or array.shape != shape:
        raise ValueError(f"{what}: {array.dtype} {array.shape} and not float32 {shape}")
    if not (array.flags.c_contiguous and array.flags.aligned and (array.flags.writeable or not written)):
        raise ValueError(f"{what}: not contiguous, aligned{' and writable' * written}")
    return array.ctypes.data
