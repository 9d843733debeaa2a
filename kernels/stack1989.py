"""Hundreds of replicas of the 1989 network at once: stack1989.c behind checks of all that is handed to it.

The source is C and CUDA. What runs it is a *launcher*, made for one variant, which is given as the defines of
its compilation, {"LOSS": "MSE", ...}. It has two methods:

    constant(name)                an integer that the source exports: shared_bytes, net_floats, extra_floats
    launch(name, replicas, job)   run the kernel train, evaluate or layout for so many replicas, each a
                                  thread block in CUDA; the Job is passed by value

`CLauncher` runs the replicas one after the other on a CPU. All pointers in a Job are those of tensors on the
device of the Stack1989, so those of a launcher for a GPU are on the GPU.
"""

import ctypes
import functools
import math
from pathlib import Path

import numpy as np
import torch

from kernels import build
from kernels.convnet1989 import SHAPES, VARIANTS

SOURCE = Path(__file__).with_name("stack1989.c")
PARAMETERS = sum(math.prod(shape) for shape in SHAPES.values())  # 9,760
AT_A_TIME = 1000  # digits in a launch: some 20 ms on a GPU, which Ctrl-C and the display have to wait for


class Job(ctypes.Structure):
    """What a launch is given: struct job of stack1989.c, which says what each field is."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("net", "extra", "images", "targets", "order", "seeds")),
        *((name, ctypes.c_void_p) for name in ("steps", "outputs", "loss", "misses", "places")),
        *((name, ctypes.c_longlong) for name in ("n", "presentations")),
        *((name, ctypes.c_float) for name in ("lr", "shrink", "rest1", "rest2", "epsilon", "kept")),
        *((name, ctypes.c_int) for name in ("dropped", "shift_pixels")),
    ]


class CLauncher:
    """Runs the kernels on this CPU: build.Unavailable where they cannot be compiled."""

    def __init__(self, defines):
        self.library = build.library(SOURCE, defines, flags=["-ffp-contract=off"])

    def constant(self, name):
        return ctypes.c_int.in_dll(self.library, name).value

    def launch(self, name, replicas, job):
        kernel = self.library[name]
        kernel.argtypes, kernel.restype = [Job, ctypes.c_longlong], None
        kernel(job, replicas)


class Stack1989:
    """A replica of the network for each of `seeds`, on a torch `device`, trained one digit at a time.

    loss: mse or cross_entropy; activation: tanh, scaled_tanh or relu; optimizer: sgd, sgd_rates or adamw;
    shift: none, roll or pad; `dropout`: the fraction of H2's outputs that is dropped. What is random follows
    from the replica's seed and the number of the presentation, as in the other engines. All replicas see the
    same digits in the same order.

    Parameters are a tensor (replicas, 9760): a row has the eight arrays of `SHAPES`, see `pack`. They are
    0 until they are set. Images (n, 1, 20, 20) have their border on. Tensors are float32, contiguous and on
    the device, or a ValueError says which is not. `make_launcher(defines)` compiles and loads a variant.
    """

    def __init__(
        self,
        seeds,
        loss="mse",
        activation="tanh",
        optimizer="sgd",
        shift="none",
        dropout=0.0,
        *,
        shift_pixels=1,
        beta1=0.9,  # of AdamW; these four are PyTorch's defaults
        beta2=0.999,
        epsilon=1e-8,
        weight_decay=0.01,
        device="cpu",
        make_launcher=CLauncher,
    ):
        chosen = {"loss": loss, "activation": activation, "optimizer": optimizer, "shift": shift}
        for name, value in chosen.items():
            if value not in VARIANTS[name]:
                raise ValueError(f"{name} {value!r} is none of {', '.join(VARIANTS[name])}")
        if not (0 <= dropout < 1 and 0 <= shift_pixels < 16 and all(0 <= seed < 2**64 for seed in seeds)):
            raise ValueError(
                f"dropout {dropout} is not in [0, 1), shift_pixels {shift_pixels} not in [0, 16), "
                "or a seed not in [0, 2^64)"
            )
        self.defines = {name.upper(): value.upper() for name, value in chosen.items()}
        self.defines["DROPOUT"] = int(dropout > 0)
        self.make_launcher, self.launcher = make_launcher, make_launcher(self.defines)
        self.seeds, self.replicas, self.device = list(seeds), len(seeds), torch.device(device)
        self.optimizer, self.dropout, self.shift_pixels = optimizer, dropout, shift_pixels
        self.betas, self.epsilon, self.weight_decay = (beta1, beta2), epsilon, weight_decay
        # The state that goes on from pass to pass
        self.presentations, self.beta_powers = 0, (1.0, 1.0)
        self.net = self._zeros(self.replicas, self.launcher.constant("net_floats"))
        self.extra = self._zeros(self.replicas, self.launcher.constant("extra_floats"))  # rates or moments
        self._seeds = torch.from_numpy(np.array(self.seeds, np.uint64).view(np.int64)).to(self.device)
        places = self._zeros(2, PARAMETERS, dtype=torch.int32)
        self._launch(self.launcher, "layout", 1, places=places)
        self._net_places, self._extra_places = places.long()  # of the parameters, in rows of these

    def parameters(self):
        """A copy of the parameters (replicas, 9760)."""
        return self.net[:, self._net_places]

    def set_parameters(self, parameters):
        """Go on from parameters (replicas, 9760)."""
        self._check(parameters, (self.replicas, PARAMETERS), "parameters")
        self.net[:, self._net_places] = parameters

    def train_pass(self, images, targets, lr):
        """Present every image once, in order, and step after each.

        targets (n, 10); `lr` is a number, for sgd_rates a tensor like the parameters. FloatingPointError,
        with the seed, if a parameter is no longer finite.
        """
        self._check_digits(images, targets)
        if self.optimizer == "sgd_rates":
            self._check(lr, (self.replicas, PARAMETERS), "rates")
            self.extra[:, self._extra_places], lr = lr, 0.0
        for shown, wanted in zip(images.split(AT_A_TIME), targets.split(AT_A_TIME)):
            self._launch(
                self.launcher,
                "train",
                self.replicas,
                net=self.net,
                extra=self.extra,
                images=shown,
                targets=wanted,
                seeds=self._seeds,
                steps=self._adamw_steps(len(shown), lr) if self.optimizer == "adamw" else None,
                n=len(shown),
                presentations=self.presentations,
                lr=lr,
                shrink=1 - lr * self.weight_decay,
                rest1=1 - self.betas[0],
                rest2=1 - self.betas[1],
                epsilon=self.epsilon,
                kept=1 / (1 - self.dropout),
                dropped=int(65536 * self.dropout),
                shift_pixels=self.shift_pixels,
            )
            self.presentations += len(shown)
        finite = self.net.isfinite().all(dim=1).tolist()
        if not all(finite):
            raise FloatingPointError(
                f"a parameter of seed {self.seeds[finite.index(False)]} is no longer finite"
            )

    def evaluate(self, images, targets):
        """The sum of each replica's losses for n digits, float64, and how many it misses, int64: (replicas,).

        The loss of a digit is the mean of ten squares, or the cross-entropy. A digit is missed if the highest
        output is not where the highest target is.
        """
        self._check_digits(images, targets)
        loss = self._zeros(self.replicas, dtype=torch.float64)
        misses = self._zeros(self.replicas, dtype=torch.int64)
        for shown, wanted in zip(images.split(AT_A_TIME), targets.split(AT_A_TIME)):
            self._evaluate(shown, wanted, loss, misses, None)
        return loss, misses

    def outputs(self, images):
        """The outputs (replicas, n, 10) for n images; of cross_entropy, the logits."""
        targets, parts = self._zeros(len(images), 10), []
        self._check_digits(images, targets)
        unused = (
            self._zeros(self.replicas, dtype=torch.float64),
            self._zeros(self.replicas, dtype=torch.int64),
        )
        for shown, wanted in zip(images.split(AT_A_TIME), targets.split(AT_A_TIME)):
            parts.append(self._zeros(self.replicas, len(shown), 10))
            self._evaluate(shown, wanted, *unused, parts[-1])
        return torch.cat(parts, dim=1)

    def _evaluate(self, images, targets, loss, misses, outputs):
        given = {"images": images, "targets": targets, "loss": loss, "misses": misses, "outputs": outputs}
        self._launch(self.launcher, "evaluate", self.replicas, net=self.net, n=len(images), **given)

    def measure_curvature(self, images, order):
        """The diagonal of the mean squared error's Gauss-Newton matrix, (replicas, 9760), for rates.

        order (replicas, n), int32: the images whose mean it is, for each replica. Connections that share a
        weight are added, without the terms between them (LeCun et al. 1998, appendix C).
        """
        if self.defines["LOSS"] != "MSE":
            raise ValueError("the Gauss-Newton diagonal is of the mean squared error")
        n = order.shape[1]
        self._check(images, (len(images), 1, 20, 20), "images")
        self._check(order, (self.replicas, n), "order", torch.int32)
        if not ((order >= 0) & (order < len(images))).all():
            raise ValueError("order: there is no such image")
        launcher, targets = self._curvature_launcher, self._zeros(len(images), 10)
        sums = self._zeros(self.replicas, launcher.constant("extra_floats"))
        for part in order.split(AT_A_TIME, dim=1):
            given = {"images": images, "targets": targets, "order": part.contiguous(), "n": part.shape[1]}
            self._launch(launcher, "train", self.replicas, net=self.net, extra=sums, **given)
        return sums[:, self._extra_places] / n

    @functools.cached_property
    def _curvature_launcher(self):
        return self.make_launcher({**self.defines, "OPTIMIZER": "CURVATURE"})

    def _adamw_steps(self, n, lr):
        """How AdamW corrects the moments in each of the next n presentations, (n, 2): see struct job."""
        powers = [
            np.multiply.accumulate([p, *[beta] * n])[1:] for p, beta in zip(self.beta_powers, self.betas)
        ]
        self.beta_powers = tuple(float(each[-1]) for each in powers)
        steps = np.stack([lr / (1 - powers[0]), 1 / np.sqrt(1 - powers[1])], axis=1)
        return torch.from_numpy(steps.astype(np.float32)).to(self.device)

    def _launch(self, launcher, name, replicas, **job):
        pointers = {key: value.data_ptr() for key, value in job.items() if torch.is_tensor(value)}
        launcher.launch(name, replicas, Job(**{**job, **pointers}))

    def _zeros(self, *shape, dtype=torch.float32):
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _check_digits(self, images, targets):
        self._check(images, (len(images), 1, 20, 20), "images")
        self._check(targets, (len(images), 10), "targets")

    def _check(self, tensor, shape, what, dtype=torch.float32):
        """Raise a ValueError if a kernel may not be given the tensor's address."""
        if not torch.is_tensor(tensor):
            raise ValueError(f"{what}: a {type(tensor).__name__} and not a tensor")
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{what}: {tensor.dtype} {tuple(tensor.shape)} and not {dtype} {shape}")
        if tensor.device != self.net.device:
            raise ValueError(f"{what}: on {tensor.device} and not on {self.net.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{what}: not contiguous")


def pack(arrays):
    """A tensor (replicas, 9760) of eight arrays or tensors (replicas, *shape), ordered as `SHAPES`."""
    return torch.cat([torch.as_tensor(array).flatten(1) for array in arrays], dim=1)


def unpack(packed):
    """The eight tensors (replicas, *shape) in a tensor (replicas, 9760), as views."""
    parts = packed.split([math.prod(shape) for shape in SHAPES.values()], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, SHAPES.values())]
