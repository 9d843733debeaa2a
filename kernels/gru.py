"""Many tiny GRUs side by side on the CPU, to be trained: gru.c behind checks of all that is handed to it."""

import ctypes
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

from kernels import build

SOURCE = Path(__file__).with_name("gru.c")
HIDDEN = 6  # units of MNIST-1D's GRU (Greydanus 2020); gru.c has the same
ROWS = 3 * HIDDEN  # of weights, in PyTorch's order: of the reset gates, the update gates, the new values


class Gru:
    """Groups of GRUs with one input and 6 units each, compiled: build.Unavailable where that cannot be done.

    states = gru(x, wi, wh, bi, bh), the equations being those of torch.nn.GRU, from a state of 0 on:
    x (groups, steps, batch), wi (groups, 18), wh (groups, 18, 6), bi (groups, 18), bh (groups, 18), and
    states (groups, steps, 6, batch) after each step. All are float32, contiguous and on the CPU, or a
    ValueError says which is not. The states can be differentiated by the weights, once, and not by x.
    """

    def __init__(self, target=None):
        library = build.library(SOURCE, {}, target)
        library.lanes.restype = ctypes.c_int32
        self.lanes = library.lanes()  # floats in a vector: 16 with AVX-512, else 8
        # ctypes lets go of Python's lock during a call, so threads may train side by side.
        self._forward, self._backward = library.forward, library.backward
        for function, tensors in ((self._forward, 7), (self._backward, 10)):
            function.argtypes = [ctypes.c_int64] * 3 + [ctypes.c_void_p] * tensors
            function.restype = None

    def __call__(self, x, wi, wh, bi, bh):
        if not isinstance(x, torch.Tensor) or x.ndim != 3:
            raise ValueError("x: not a tensor of three dimensions (groups, steps, batch)")
        groups = x.shape[0]
        _check(x, tuple(x.shape), "x")
        if x.requires_grad:
            raise ValueError("x: requires a gradient, which is not computed")
        _check(wi, (groups, ROWS), "wi")
        _check(wh, (groups, ROWS, HIDDEN), "wh")
        _check(bi, (groups, ROWS), "bi")
        _check(bh, (groups, ROWS), "bh")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (wi, wh, bi, bh)):
            return _Recurrence.apply(self, x, wi, wh, bi, bh)
        return self.compute_states(x, wi, wh, bi, bh)

    def compute_states(self, x, wi, wh, bi, bh, gates=None):
        """The states, of tensors that are checked already; `gates` is filled for compute_gradients."""
        groups, steps, batch = x.shape
        states = x.new_empty(groups, steps, HIDDEN, batch)
        self._forward(*x.shape, *_addresses(x, wi, wh, bi, bh, states, gates))
        return states

    def compute_gradients(self, x, wh, bh, states, gates, dstates):
        """The gradients by wi, wh, bi and bh; dstates is that by the states."""
        dwi, dwh, dbi, dbh = bh.new_empty(bh.shape), wh.new_empty(wh.shape), *bh.new_empty(2, *bh.shape)
        self._backward(*x.shape, *_addresses(x, wh, bh, states, gates, dstates, dwi, dwh, dbi, dbh))
        return dwi, dwh, dbi, dbh


class _Recurrence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gru, x, wi, wh, bi, bh):
        groups, steps, batch = x.shape
        # Kept beside the states: r, z and n of each unit, in blocks of `lanes` sequences, the last padded.
        # wh_n h + bh_n is computed again, so that a quarter less is written and read.
        gates = x.new_empty(groups, -(-batch // gru.lanes), steps, HIDDEN, 3, gru.lanes)
        states = gru.compute_states(x, wi, wh, bi, bh, gates)
        ctx.gru = gru
        ctx.save_for_backward(x, wh, bh, states, gates)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dstates):
        x, wh, bh, states, gates = ctx.saved_tensors
        # That of a sum, or of a transposed view, is not contiguous.
        gradients = ctx.gru.compute_gradients(x, wh, bh, states, gates, dstates.contiguous())
        return None, None, *gradients


def _addresses(*tensors):
    """Of tensors, which have to outlive them; NULL in the place of None."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _check(tensor, shape, what):
    """Whether C may be given the tensor's address."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{what}: a {type(tensor).__name__} and not a tensor")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(
            f"{what}: a {tensor.layout} tensor on {tensor.device} and not a dense one on the CPU"
        )
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise ValueError(f"{what}: {tensor.dtype} {tuple(tensor.shape)} and not torch.float32 {shape}")
    if not tensor.is_contiguous():
        raise ValueError(f"{what}: not contiguous")
    if tensor.data_ptr() % 4:
        raise ValueError(f"{what}: not aligned")
