"""The vision transformers of studies/myth6_micro_vit.py, about as small as the network of 1989.

`convolutions` are the sizes of kernels, the steps between them, and their outputs: a patch is a kernel that
overlaps no other. The head has a hidden layer that reads all positions, or else it reads their mean. Hidden
values are those of studies/mixers.py, but before the first block their positions are rows and columns.
"""

import math

import torch
import torch.nn.functional as F

import utils
from studies import mixers, mnist1d

NETWORKS = {
    "patch4": {"convolutions": [[4, 4, 16]], "heads": 4, "blocks": 1, "hidden": 52, "head": 24},
    "patch2": {"convolutions": [[2, 2, 4]], "heads": 2, "blocks": 1, "hidden": 28, "head": 34},
    "stem": {"convolutions": [[3, 2, 8], [3, 2, 16]], "heads": 4, "blocks": 1, "hidden": 16, "head": 24},
    "mean": {"convolutions": [[4, 4, 20]], "heads": 4, "blocks": 2, "hidden": 67, "head": 0},
}


def convolve(p, name, h, size, step):
    """A convolution of h (replicas, channels, height, width, n); kernels that overlap are padded."""
    if size > step:
        h = F.pad(h, (0, 0, 0, size - step, 0, size - step))
    places = (h.shape[2] - size) // step + 1
    taps = [slice(k, k + step * (places - 1) + 1, step) for k in range(size)]
    return mixers.linear(p, name, torch.cat([h[:, :, down, right] for down in taps for right in taps], dim=1))


def forward(config, p, x, kept=None):
    """Logits (replicas, 10, n) of images (replicas, 256, n). `kept` multiplies what the head reads."""
    h = x.unflatten(1, (1, 16, 16)) + 1  # from 0 to 2, so that the border is background
    for number, (size, step, _) in enumerate(config["convolutions"]):
        h = convolve(p, f"conv{number}", h.relu(), size, step)
    h = h.flatten(2, 3) + p["positions"][..., None]
    for number in range(config["blocks"]):
        h = mixers.block(p, f"block{number}_", h, config)
    h = mixers.norm(h)
    h = h.flatten(1, 2) if config["head"] else h.mean(2)
    h = h if kept is None else h * kept
    return mnist1d.linear(p, "out", mnist1d.linear(p, "head", h).relu() if config["head"] else h)


def shapes(config):
    found, inputs, side, channels = {}, 1, 16, config["channels"]
    for number, (size, step, outputs) in enumerate(config["convolutions"]):
        found |= mnist1d.layer(f"conv{number}", inputs * size**2, outputs)
        inputs, side = outputs, side // step
    found |= {"positions": ((channels, side**2), side**2)}
    for number in range(config["blocks"]):
        found |= mixers.block_shapes(f"block{number}_", side**2, config)
    if not config["head"]:
        return found | mnist1d.layer("out", channels, 10)
    found |= mnist1d.layer("head", channels * side**2, config["head"])
    return found | mnist1d.layer("out", config["head"], 10)


def connections(config):
    """How many products and biases an image takes, as the 64,660 of 1989 are counted."""
    side, total, found = 16, 0, shapes(config)
    for number, (_, step, _) in enumerate(config["convolutions"]):
        side //= step
        total += side**2 * sum(math.prod(found[f"conv{number}_{kind}"][0]) for kind in ("weight", "bias"))
    for name, (shape, _) in found.items():
        if not name.startswith("conv"):
            total += math.prod(shape) * (side**2 if name.startswith("block") else 1)
    return total + config["blocks"] * 2 * side**4 * config["channels"]  # queries with keys, and the sums


def sizes(config):
    """How many parameters and connections a network has; config["network"] may be one of 1989's, too."""
    if config["network"] not in NETWORKS:
        row = utils.reference("lecun1989")["sizes"]
        return row["parameters"], row["connections"]
    return mnist1d.count(shapes(config)), connections(config)
