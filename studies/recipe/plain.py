"""The six networks and their training again, short and slow, in double precision: nothing here is imported.

What the scripts compute fast (stacked, grouped, in C, by labels that are added later) is written here as one
writes the special case first: one convolution for each map, one image for each label, torch.nn's GRU. Checks
hold the scripts against it. Only random numbers (shifts, dropped units, negatives) are those of the scripts.
"""

import math

import torch
import torch.nn.functional as F

# The network of 1989

READS = (
    [range(8)] * 4 + [range(4, 12)] * 4 + [(0, 1, 2, 3, 8, 9, 10, 11)] * 4
)  # maps of H1, of each map of H2


def digits_forward(network, x, hidden=torch.tanh, output=torch.tanh, scale=1.0):
    """Outputs (n, 10) of images (n, 1, 20, 20); `scale` (n, 192) multiplies the units of H2."""
    w1, b1, w2, b2, w3, b3, w4, b4 = network.values()
    h = F.pad(hidden(F.conv2d(x, w1, stride=2) + b1), (2, 2, 2, 2), value=-1)
    maps = [F.conv2d(h[:, list(READS[m])], w2[m : m + 1], stride=2) for m in range(12)]
    h = hidden(torch.cat(maps, dim=1) + b2).flatten(1) * scale
    return output(hidden(h @ w3 + b3) @ w4 + b4)


def moved(x, down, right, wraps):
    """Image (1, 20, 20) of 16x16 pixels and a border; what leaves comes in on the other side, or -1 does."""
    inner = torch.roll(x[0, 2:-2, 2:-2], (down, right), (0, 1)).clone()
    if not wraps:
        inner[: max(down, 0)] = inner[16 + min(down, 0) :] = -1
        inner[:, : max(right, 0)] = inner[:, 16 + min(right, 0) :] = -1
    return F.pad(inner, (2, 2, 2, 2), value=-1)[None]


# MNIST-1D


def mlp(network, x):
    w1, b1, w2, b2, w3, b3 = network.values()
    h = F.relu(F.linear(x, w1, b1[:, 0]))
    return F.linear(h + F.relu(F.linear(h, w2, b2[:, 0])), w3, b3[:, 0])


def cnn(network, x):
    *convolutions, w, b = network.values()
    h = x[:, None]
    for kernel, bias in zip(convolutions[::2], convolutions[1::2]):
        kernel = kernel.unflatten(1, (h.shape[1], -1))  # (25, channels, width)
        h = F.relu(F.conv1d(h, kernel, bias[:, 0], stride=2, padding=1))
    return F.linear(h.flatten(1), w, b[:, 0])


def gru(network, x):
    """torch.nn.GRU, and a linear layer that reads both directions' states as each computed them."""
    module = torch.nn.GRU(1, 6, batch_first=True, bidirectional=True)
    names = {"weight_ih": "gru_wi", "weight_hh": "gru_wh", "bias_ih": "gru_bi", "bias_hh": "gru_bh"}
    own = {}
    for name, (way, end) in ((name, pair) for name in names for pair in enumerate(("", "_reverse"))):
        tensor = network[names[name]][way]
        own[f"{name}_l0{end}"] = tensor if name.startswith("weight") else tensor[:, 0]
    states = torch.func.functional_call(module, own, x[:, :, None])[0]  # (n, 40, 12)
    both = torch.cat([states[..., :6].flatten(1), states[..., 6:].flip(1).flatten(1)], dim=1)
    return F.linear(both, network["out_weight"], network["out_bias"][:, 0])


# Training by backpropagation


def doubled(network):
    return {name: tensor.detach().double().requires_grad_() for name, tensor in network.items()}


def train(network, x, y, forward, losses, optimizer, lr, passes, batch_size=1):
    """The usual loop. `lr(number)` is the rate of a pass; `forward(network, x, first)` gets x's place."""
    network, seen = doubled(network), 0
    optimizer = optimizer(network.values())
    for number in range(1, passes + 1):
        optimizer.param_groups[0]["lr"] = lr(number)
        for first in range(0, len(y), batch_size):
            batch, answers = x[first : first + batch_size].double(), y[first : first + batch_size]
            optimizer.zero_grad()
            losses(forward(network, batch, seen), answers).mean().backward()
            optimizer.step()
            seen += len(answers)
    return network


# Forward-Forward


def with_label(x, label, scale=8.0):
    """Images (n, k) with the label (an int, or None for a tenth of each) in their first ten inputs."""
    code = torch.full((10,), 0.1).to(x) if label is None else torch.eye(10).to(x)[label]
    return torch.cat([scale * code.expand(len(x), 10), x[:, 10:]], dim=1)


def ff_layers(network, x):
    """(activities, what is passed on) of each layer."""
    found = []
    for number in range(1, len(network) // 2 + 1):
        h = (x @ network[f"weights{number}"] + network[f"biases{number}"]).clamp(min=0)
        x = h / (h.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        found.append((h, x))
    return found


def ff_forward(network, x):
    """The goodness above the threshold, one for each unit, of all layers together, for each label (n, 10)."""
    sums = [
        sum(h.square().sum(dim=1) - h.shape[1] for h, _ in ff_layers(network, with_label(x, label)))
        for label in range(10)
    ]
    return torch.stack(sums, dim=1)


def ff_train(network, y, passes, batches, config):
    """All layers by their own loss only. `batches(number)`: (images, which, chances, rate) of a pass."""
    network = {name: tensor.detach().double() for name, tensor in network.items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in network.items()}
    depth = len(network) // 2
    activity = [torch.full_like(network[f"biases{k}"], 0.5) for k in range(1, depth + 1)]

    def ascend(name, gradient, lr, decay):
        velocity[name] = 0.9 * velocity[name] + 0.1 * gradient
        network[name] = network[name] * (1 - lr * decay) + lr * velocity[name]

    for number in range(passes):
        for images, which, chances, rate in batches(number):
            images, labels, n = images.double(), y[which], len(which)
            read = torch.cat([out for _, out in ff_layers(network, with_label(images, None))], dim=1)
            answers = torch.softmax(read @ network["head"], dim=1)
            wrong = []  # a wrong label each, the more likely the more the softmax believes in it
            for answer, label, chance in zip(answers, labels.tolist(), chances.tolist()):
                weights = [0 if k == label else answer[k].item() + 1e-9 for k in range(10)]
                left, k = chance * math.fsum(weights), 0
                while k < 9 and left >= weights[k]:
                    left, k = left - weights[k], k + 1
                wrong.append(k)
            both = torch.cat([labels, torch.tensor(wrong)])
            pictures = torch.cat([images, images])
            inputs = torch.stack([with_label(one[None], int(k))[0] for one, k in zip(pictures, both)])
            outputs = ff_layers(network, inputs)
            for k, (h, passed_on) in enumerate(outputs, start=1):
                w = network[f"weights{k}"].clone().requires_grad_()
                b = network[f"biases{k}"].clone().requires_grad_()
                z = inputs @ w + b
                logit = z.relu().square().sum(dim=1) - z.shape[1]
                right = torch.cat([logit[:n], -logit[n:]])
                taught = torch.sigmoid(-right) > config["skip_threshold"]
                pull = config["peer"] * (activity[k - 1].mean() - activity[k - 1])
                objective = (F.logsigmoid(right[taught]).sum() + (pull * z[:n]).sum()) / n
                of_w, of_b = torch.autograd.grad(objective, (w, b))
                ascend(f"weights{k}", of_w, rate * config["lr"], config["weight_decay"])
                ascend(f"biases{k}", of_b, rate * config["lr"], 0)
                activity[k - 1] = 0.9 * activity[k - 1] + 0.1 * h[:n].mean(dim=0)
                inputs = passed_on
            of_head = read.T @ (F.one_hot(labels, 10) - answers) / n
            ascend("head", of_head, rate * config["head_lr"], config["head_weight_decay"])
    return network
