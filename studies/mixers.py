"""What the studies of myth 6 share: the blocks of a small transformer, with attention or a convolution.

A block lets the positions of a signal exchange what they know (it *mixes* them), and then computes with
each position by itself. Hidden values h are (replicas, channels, positions, n), where n counts examples, and
`p` holds the parameters (replicas, ...) by name, as in studies/mnist1d.py. With K positions in a kernel, the
mixers are:

    conv        a convolution: each output channel reads all input channels at K positions
    depthwise   each channel reads itself at K positions
    light       the same, but the K weights are a softmax, and all channels of a head share them
    dynamic     as light, but each position computes its own K weights from what it holds
    attention   each position computes its weights for all positions, by comparing itself with them
    relative    attention, plus a learned bias for each distance between two positions
    window      the same, but positions that are more than K // 2 apart do not see each other

Light and dynamic convolutions, and the gate before depthwise, are those of Wu et al. 2019 (arXiv 1901.10430).
"""

import math

import torch
import torch.nn.functional as F

from studies import mnist1d

LOCAL = "depthwise", "light", "dynamic"  # those that a gated linear unit precedes
EPSILON = 1e-5


def linear(p, name, h):
    """The linear layer `name` at each position."""
    return mnist1d.linear(p, name, h.flatten(2)).unflatten(2, h.shape[2:])


def norm(h):
    """Layer normalisation over channels. The linear layer that follows takes the part of gain and bias."""
    h = h - h.mean(1, keepdim=True)
    return h * (h.square().mean(1, keepdim=True) + EPSILON).rsqrt()


def windows(h, width):
    """What each position and its neighbours hold: (replicas, width * channels, positions, n)."""
    padded = F.pad(h, (0, 0, width // 2, width // 2))
    return torch.cat([padded[:, :, k : k + h.shape[2]] for k in range(width)], dim=1)


def block(p, name, h, config):
    """A block, whose parameters begin with `name`: mix the positions, then compute with each."""
    h = h + mix(p, name, norm(h), config)
    return h + linear(p, f"{name}down", linear(p, f"{name}up", norm(h)).relu())


def mix(p, name, h, config):
    kind, heads = config["mixer"], config["heads"]
    if kind == "conv":
        mixed = linear(p, f"{name}conv", windows(h, config["kernel_width"]))
    elif kind in LOCAL:
        values, gates = linear(p, f"{name}glu", h).chunk(2, dim=1)
        heads = config["channels"] if kind == "depthwise" else heads
        values = (values * gates.sigmoid()).unflatten(1, (heads, -1))
        kernels = linear(p, f"{name}kernel", h) if kind == "dynamic" else p[f"{name}kernel"][..., None]
        kernels = kernels.unflatten(1, (heads, -1))  # (replicas, heads, K, positions or 1, n or 1)
        if kind != "depthwise":
            kernels = kernels.softmax(2)
        mixed = WeightedWindows.apply(kernels, values).flatten(1, 2)
    else:
        qkv = linear(p, f"{name}qkv", h).unflatten(1, (3, heads, -1))
        queries, keys, values = qkv.permute(1, 0, 2, 5, 3, 4).flatten(2, 3).contiguous()
        bias = None
        if kind in ("relative", "window"):
            places = torch.arange(h.shape[2])
            apart = places[:, None] - places
            bias = p[f"{name}bias"].flatten(2)[:, :, apart + len(places) - 1]
            if kind == "window":
                bias = bias.masked_fill(apart.abs() > config["kernel_width"] // 2, -math.inf)
        mixed = Attention.apply(queries * queries.shape[2] ** -0.5, keys, values, bias)
        mixed = mixed.unflatten(1, (heads, -1)).permute(0, 1, 3, 4, 2).flatten(1, 2)
    return linear(p, f"{name}mix", mixed)


def block_shapes(name, positions, config):
    """The shape and the fan-in of the parameters of a block, by name, as mnist1d.layer gives them."""
    kind, heads, width, d = (config[key] for key in ("mixer", "heads", "kernel_width", "channels"))
    if kind == "conv":
        shapes = mnist1d.layer(f"{name}conv", width * d, d)
    elif kind in LOCAL:
        shapes = mnist1d.layer(f"{name}glu", d, 2 * d)
        if kind == "dynamic":
            shapes |= mnist1d.layer(f"{name}kernel", d, heads * width)
        else:
            shapes |= {f"{name}kernel": (((d if kind == "depthwise" else heads) * width, 1), width)}
    else:
        shapes = mnist1d.layer(f"{name}qkv", d, 3 * d)
        if kind in ("relative", "window"):
            shapes |= {f"{name}bias": ((heads, 2 * positions - 1), 2 * positions - 1)}
    shapes |= mnist1d.layer(f"{name}mix", d, d)
    return (
        shapes
        | mnist1d.layer(f"{name}up", d, config["hidden"])
        | mnist1d.layer(f"{name}down", config["hidden"], d)
    )


# Derivatives by hand. Those of autograd take up to twice as long, because they keep more and larger tensors.


class WeightedWindows(torch.autograd.Function):
    """out[h, c, i] = sum over k of kernels[h, k, i] values[h, c, i + k - K // 2], for replicas and examples.

    kernels (replicas, heads, K, positions or 1, n or 1), values (replicas, heads, channels, positions, n).
    """

    @staticmethod
    def forward(ctx, kernels, values):
        middle = kernels.shape[2] // 2
        kernels, padded = kernels[:, :, None], F.pad(values, (0, 0, middle, middle))
        ctx.save_for_backward(kernels, padded)
        out = torch.zeros_like(values)
        for k in range(kernels.shape[3]):
            out.addcmul_(kernels[:, :, :, k], padded[:, :, :, k : k + values.shape[3]])
        return out

    @staticmethod
    def backward(ctx, gradient):
        kernels, padded = ctx.saved_tensors
        of_kernels, of_padded, positions = [], torch.zeros_like(padded), gradient.shape[3]
        for k in range(kernels.shape[3]):
            kernel, there = kernels[:, :, :, k], slice(k, k + positions)
            of_padded[:, :, :, there].addcmul_(kernel, gradient)
            of_kernels.append((gradient * padded[:, :, :, there]).sum_to_size(kernel.shape)[:, :, 0])
        middle = kernels.shape[3] // 2
        return torch.stack(of_kernels, dim=2), of_padded[:, :, :, middle : middle + positions]


class Attention(torch.autograd.Function):
    """softmax(queries' keys + bias) values. All but bias are (replicas, heads * n, channels, positions).

    bias (replicas, heads, positions of keys, positions of queries), or None. The softmax is over keys. Its
    denominator is one more row of the product: that of values which are all 1.
    """

    @staticmethod
    def forward(ctx, queries, keys, values, bias):
        values = F.pad(values, (0, 0, 0, 1), value=1.0)
        weights = queries.new_empty(*queries.shape[:2], keys.shape[3], queries.shape[3])
        sums = torch.empty_like(values)
        for r in range(len(queries)):  # a replica at a time, because its weights fit into the cache
            scores = torch.bmm(keys[r].mT, queries[r], out=weights[r])
            if bias is not None:
                scores.unflatten(0, (bias.shape[1], -1)).add_(bias[r][:, None])
            scores.sub_(scores.amax(1, keepdim=True)).exp_()
            torch.bmm(values[r], scores, out=sums[r])
        out = sums[:, :, :-1] / sums[:, :, -1:]
        ctx.save_for_backward(queries, keys, values, weights, sums[:, :, -1:], out, bias)
        return out

    @staticmethod
    def backward(ctx, gradient):
        queries, keys, values, weights, total, out, bias = ctx.saved_tensors
        gradient = gradient / total
        of_sums = torch.cat([gradient, -(gradient * out).sum(2, keepdim=True)], dim=2)
        of_queries, of_keys, of_values = (torch.empty_like(each) for each in (queries, keys, gradient))
        of_bias = None if bias is None else torch.empty_like(bias)
        for r in range(len(queries)):
            torch.bmm(gradient[r], weights[r].mT, out=of_values[r])
            of_scores = torch.bmm(values[r].mT, of_sums[r]).mul_(weights[r])
            torch.bmm(keys[r], of_scores, out=of_queries[r])
            torch.bmm(queries[r], of_scores.mT, out=of_keys[r])
            if bias is not None:
                torch.sum(of_scores.unflatten(0, (bias.shape[1], -1)), 1, out=of_bias[r])
        return of_queries, of_keys, of_values, of_bias
