"""What the studies of MNIST-1D share: its networks, as batched products, and how its notebooks train them.

Networks that differ only in their seed (replicas) are trained together, and each gets the result that it
would get alone. The first dimension of every tensor is the replica and the last is the example. Signals are
(replicas, 40, n), logits are (replicas, 10, n), and `p` holds the parameters (replicas, ...) by name.
"""

import numpy as np
import torch
import torch.nn.functional as F

from records import run as runs


def linear(p, name, x):
    """A linear layer of x (replicas, inputs, n)."""
    return torch.baddbmm(p[f"{name}_bias"], p[f"{name}_weight"], x)


def windows(h, width, stride=2):
    """The windows of h (replicas, channels, positions, n), padded by 1, as columns of a matrix.

    (replicas, channels * width, windows * n).
    """
    return F.pad(h, (0, 0, 1, 1)).unfold(2, width, stride).movedim(4, 2).flatten(3).flatten(1, 2)


def conv(p, name, width, h, stride=2):
    """F.conv1d with padding 1: from (replicas, channels, positions, n) to fewer positions.

    F.conv1d itself, with a group for each replica, takes twice as long on a CPU.
    """
    return linear(p, name, windows(h, width, stride)).unflatten(2, (-1, h.shape[3]))


# The networks of the repository's notebooks/models.py


def logistic(p, x):
    return linear(p, "out", x)


def mlp(p, x):
    h = linear(p, "hidden1", x).relu()
    h = h + linear(p, "hidden2", h).relu()
    return linear(p, "out", h)


def convolutions(p, x):
    """What the three convolutions of the CNN make of signals: (replicas, 5 * channels, n)."""
    h = x[:, None]  # (replicas, 1 channel, 40 positions, n)
    for name, width in (("conv1", 5), ("conv2", 3), ("conv3", 3)):
        h = conv(p, name, width, h).relu()
    return h.flatten(1, 2)  # 40 positions have become 19, 10 and 5


def cnn(p, x):
    return linear(p, "out", convolutions(p, x))


def layer(name, inputs, outputs):
    """name -> shape and fan-in of the parameters of a linear layer or a convolution."""
    return {f"{name}_weight": ((outputs, inputs), inputs), f"{name}_bias": ((outputs, 1), inputs)}


def mlp_shapes(hidden):
    return layer("hidden1", 40, hidden) | layer("hidden2", hidden, hidden) | layer("out", hidden, 10)


def convolution_shapes(channels):
    inner = 3 * channels
    return layer("conv1", 5, channels) | layer("conv2", inner, channels) | layer("conv3", inner, channels)


def cnn_shapes(channels):
    return convolution_shapes(channels) | layer("out", 5 * channels, 10)


def count(shapes):
    """How many parameters a network has."""
    return sum(int(np.prod(shape)) for shape, _ in shapes.values())


def init_parameters(shapes, seeds, device="cpu"):
    """Parameters (replicas, ...) by name, uniform within ±1/sqrt(fan-in), as PyTorch's layers begin.

    `shapes` has the shape and the fan-in of each, in the order in which they are sampled.
    """
    stacks = {name: [] for name in shapes}
    for seed in seeds:
        generator = np.random.default_rng(seed)
        for name, (shape, fan_in) in shapes.items():
            stacks[name].append(generator.uniform(-(fan_in**-0.5), fan_in**-0.5, shape))
    return {
        name: torch.tensor(np.stack(stack), dtype=torch.float32, device=device).requires_grad_()
        for name, stack in stacks.items()
    }


# Training


def as_tensors(x, y, device="cpu"):
    """Signals (40, n) in float32 and labels (n,) of examples (n, 40)."""
    return torch.tensor(x.T, dtype=torch.float32, device=device), torch.tensor(y, device=device)


def cross_entropy(logits, y):
    """The mean loss of each replica (replicas,) on a batch of labels (n,)."""
    return F.cross_entropy(logits, y.expand(len(logits), -1), reduction="none").mean(dim=1)


def train_as_published(forward, parameters, signals, labels, config):
    """The loop of the repository's train.py: yield each step, from 0 to `steps`, after its update.

    Adam, on batches of `batch_size` in a fixed order. The gradient of each replica is that of its own loss.
    """
    size = config["batch_size"]
    # Not fused=True: it rounds the last few numbers of a tensor otherwise, so that a replica's result would
    # depend on how many others are trained beside it.
    optimizer = torch.optim.Adam(parameters.values(), lr=config["lr"], foreach=True)
    for step in range(config["steps"] + 1):
        first = step * size % len(labels)
        x, y = signals[:, first : first + size], labels[first : first + size]
        logits = forward(parameters, x.expand(len(parameters["out_bias"]), -1, -1))
        optimizer.zero_grad()
        cross_entropy(logits, y).sum().backward()
        optimizer.step()
        yield step


@torch.no_grad()
def evaluate(forward, parameters, signals, labels, at_a_time=500):
    """The mean loss of each replica over a split, and how many of each class it misses (replicas, 10)."""
    replicas, loss, misses = len(parameters["out_bias"]), 0, 0
    for x, y in zip(signals.split(at_a_time, dim=1), labels.split(at_a_time)):
        logits, target = forward(parameters, x.expand(replicas, -1, -1)), y.expand(replicas, -1)
        loss += F.cross_entropy(logits, target, reduction="none").cpu().double().sum(dim=1)
        misses += (logits.argmax(dim=1) != target).long().cpu() @ F.one_hot(y, 10).cpu()
    return (loss / len(labels)).tolist(), misses.tolist()


def evaluations(forward, parameters, split, signals, labels, step, config, train_size):
    """The record of each replica on a split after a step, with how many of each class it misses."""
    passes = (step + 1) * config["batch_size"] // train_size
    return [
        {
            "step": step,
            **runs.evaluation(passes, split, loss, sum(missed), len(labels)),
            "class_misses": missed,
        }
        for loss, missed in zip(*evaluate(forward, parameters, signals, labels))
    ]


# A convolution, faster


def fast_conv(p, name, h, stride=2):
    """`conv` in two thirds of the time, where h has many channels; the last bits differ."""
    return TapConv.apply(p[f"{name}_weight"], p[f"{name}_bias"], h, stride)


class TapConv(torch.autograd.Function):
    """A convolution as the sum of one product for each tap of the kernel, so that h is not copied as windows.

    weight (replicas, outputs, channels * width), bias (replicas, outputs, 1), h (replicas, channels,
    positions, n), which is padded by 1.
    """

    @staticmethod
    def forward(ctx, weight, bias, h, stride):
        taps, padded = weight.unflatten(2, (h.shape[1], -1)).unbind(3), F.pad(h, (0, 0, 1, 1))
        reach = padded.shape[2] - len(taps) + 1
        seen = [padded[:, :, k : k + reach : stride] for k in range(len(taps))]  # by each tap
        ctx.stride, ctx.reach, ctx.padded_shape, shape = stride, reach, padded.shape, seen[0].shape[2:]
        seen = [each.flatten(2) for each in seen]
        ctx.save_for_backward(weight, *seen)
        out = torch.baddbmm(bias, taps[0], seen[0])
        for tap, each in zip(taps[1:], seen[1:]):
            out.baddbmm_(tap, each)
        return out.unflatten(2, shape)

    @staticmethod
    def backward(ctx, gradient):
        weight, *seen = ctx.saved_tensors
        g, of_h = gradient.flatten(2), None
        of_weight = torch.stack([torch.bmm(g, each.mT) for each in seen], dim=3).flatten(2)
        if ctx.needs_input_grad[2]:
            padded = g.new_zeros(ctx.padded_shape)
            for k, tap in enumerate(weight.unflatten(2, (-1, len(seen))).unbind(3)):
                places = slice(k, k + ctx.reach, ctx.stride)
                padded[:, :, places] += torch.bmm(tap.mT, g).unflatten(2, gradient.shape[2:])
            of_h = padded[:, :, 1:-1]
        return of_weight, g.sum(2, keepdim=True), of_h, None
