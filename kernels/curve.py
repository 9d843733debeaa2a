"""The C engine of piecewise cubic curves: curve.c behind checks of the tensors that are handed to it."""

import ctypes
from pathlib import Path

import torch

from kernels import build

SOURCE = Path(__file__).with_name("curve.c")


class Curve:
    """curve.c, compiled: build.Unavailable where that cannot be done.

    The cells begin at `low` and have the width 1 / `cells_per_unit`. All tensors are float32, on the CPU and
    contiguous, or a ValueError says which is not.
    """

    def __init__(self, low, cells_per_unit):
        library, self.grid = build.library(SOURCE, {}), (low, cells_per_unit)
        address, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._forward, self._backward = library.curve_forward, library.curve_backward
        self._forward.argtypes = [integer] * 3 + [number] * 2 + [address] * 4
        self._backward.argtypes = [integer] * 3 + [number] * 2 + [address] * 6

    def forward(self, coefficients, points):
        """Values and slopes, each (replicas, ...), of curves (replicas, cells, 4) at points."""
        values, slopes = torch.empty_like(points), torch.empty_like(points)
        self._call(self._forward, coefficients, points=points, values=values, slopes=slopes)
        return values, slopes

    def backward(self, coefficients, points, of_values, of_slopes, of_coefficients):
        """The gradient of the points; that of the coefficients is added to `of_coefficients`."""
        if of_coefficients.shape != coefficients.shape:
            raise ValueError(f"of_coefficients: {tuple(of_coefficients.shape)} is not the curves' shape")
        of_points = torch.empty_like(points)
        gradients = {"of_values": of_values, "of_slopes": of_slopes, "of_points": of_points}
        self._call(self._backward, coefficients, points=points, **gradients, of_coefficients=of_coefficients)
        return of_points

    def _call(self, function, coefficients, **tensors):
        replicas, cells = coefficients.shape[:2]
        shape = tensors["points"].shape
        for name, tensor in {"coefficients": coefficients, **tensors}.items():
            if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
                raise ValueError(f"{name}: not contiguous float32 on the CPU")
            if "coefficients" not in name and (tensor.shape != shape or len(tensor) != replicas):
                raise ValueError(
                    f"{name}: {tuple(tensor.shape)} and not {tuple(shape)} of {replicas} replicas"
                )
        n = tensors["points"][0].numel()
        addresses = [tensor.data_ptr() for tensor in (coefficients, *tensors.values())]
        function(replicas, n, cells, *self.grid, *addresses)
