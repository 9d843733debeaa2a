"""How studies/metalearn_activation.py learns an activation function, and what makes that fast.

The learned function is f(x) = ELU(x) + 0.2 g(x), where g is a network of 100 tanh units (`meta`). An outer
step trains an MLP with f for 301 steps and differentiates the mean of the last 200 losses with respect to
the weights of g. Gradient descent then changes g. This file has, in this order, the learned function, the
inner training, the functions that it is compared with, the outer gradient, and the loop of the outer steps;
then what the notebook samples and how it evaluates; and last what makes it fast.

Tensors are as in studies/mnist1d.py: the first dimension is the replica and the last the example.
"""

import functools

import torch
import torch.nn.functional as F

import utils
from kernels.inner_training import InnerTraining
from records import run as runs
from studies import mnist1d
from studies.metalearn_lr import make_batches, sample_linear, sample_networks

# The learned function


def sample_learned(generator, config):
    """The network of g, as the notebook samples it: [hidden weight, hidden bias, out weight, out bias]."""
    hidden = config["meta_hidden"]
    return [*sample_linear(generator, 1, hidden), *sample_linear(generator, hidden, 1)]


def evaluate_learned(meta, x, config):
    """The learned functions of networks `meta` (replicas, ...) at points x (n,), and their slopes."""
    w1, b1, w2, b2 = meta
    h = (w1 * x + b1).tanh()
    slopes = (w2 * w1.transpose(1, 2)) @ (1 - h * h)
    values, slopes = (config["meta_scale"] * each[:, 0] for each in (w2 @ h + b2, slopes))
    return F.elu(x) + values, torch.where(x > 0, torch.ones_like(x), x.exp()) + slopes


def numbers_of(meta, replica):
    """The weights of a replica's g as a list, with all digits that float32 has."""
    numbers = torch.cat([tensor[replica].flatten() for tensor in meta]).tolist()
    return [float(f"{number:.9g}") for number in numbers]


def last_meta(records, config):
    """The network g (1, ...) of the last outer step whose function was kept in the records of a seed."""
    hidden, numbers = config["meta_hidden"], [record["meta"] for record in records if "meta" in record][-1]
    w1, b1, w2, b2 = torch.tensor(numbers).split([hidden, hidden, hidden, 1])
    return [w1.view(1, hidden, 1), b1.view(1, hidden, 1), w2.view(1, 1, hidden), b2.view(1, 1, 1)]


# Training an MLP with an activation


def train_inner(activation, p, batches, shifts, lr, config):
    """RMSprop-like training of networks p (replicas, ...): the losses (replicas, steps) and the parameters.

    `activation(points)` returns values and slopes. `batches` are signals (replicas or 1, 40, n) and labels
    (replicas or 1, n); `shifts` (replicas, hidden, steps) are added to the values. The inner gradient is
    written out, so that the losses can be differentiated once more.
    """
    squares, losses = {name: torch.ones_like(tensor) for name, tensor in p.items()}, []
    for (x, y), shift in zip(batches, shifts.unbind(2)):
        x = x.expand(len(p["out_bias"]), -1, -1)
        values, slopes = activation(mnist1d.linear(p, "hidden", x))
        h = values + shift[:, :, None]  # (replicas, hidden, n)
        log_p = mnist1d.linear(p, "out", h).log_softmax(dim=1)
        losses.append(F.nll_loss(log_p, y.expand(len(x), -1), reduction="none").mean(dim=1))
        of_out = (log_p.exp() - F.one_hot(y, 10).transpose(1, 2)) / x.shape[2]
        of_hidden = (p["out_weight"].transpose(1, 2) @ of_out) * slopes
        gradients = {
            "hidden_weight": of_hidden @ x.transpose(1, 2),
            "hidden_bias": of_hidden.sum(dim=2, keepdim=True),
            "out_weight": of_out @ h.transpose(1, 2),
            "out_bias": of_out.sum(dim=2, keepdim=True),
        }
        keep = config["mean_square"]
        squares = {name: keep * squares[name] + (1 - keep) * g * g for name, g in gradients.items()}
        p = {
            name: p[name] - lr * g / (squares[name].sqrt() + config["epsilon"])
            for name, g in gradients.items()
        }
    return torch.stack(losses, dim=1), p


# The functions that it is compared with


def published_fit(x):
    """The notebook's six straight lines that look like its learned function."""
    fit = utils.reference("mnist1d")["activation-hand-fit"]
    pieces = torch.bucketize(x, x.new_tensor(fit["breaks"]))
    return x.new_tensor(fit["slopes"])[pieces] * x + x.new_tensor(fit["intercepts"])[pieces]


ACTIVATIONS = {
    "relu": torch.relu,
    "swish": F.silu,
    "elu": F.elu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "hand-fit": published_fit,
}


def with_slopes(function):
    """An activation that returns values and slopes, of a function for which autograd knows the slopes."""

    def activation(points):
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            values = function(points)
            slopes = torch.autograd.grad(values.sum(), points)[0]
        return values.detach(), slopes

    return activation


# The outer gradient, and the outer steps that descend it


def meta_gradient(meta, p, noises, batches, config, engine):
    """Train networks p with the functions of `meta`, and differentiate the outer losses.

    Returns the gradients with respect to `meta`, the losses (replicas, steps), the trained parameters and the
    activation. The training sees a table of each function, and the noise within g as a constant that is added
    to it in each step. The outer loss is differentiated with respect to these two; autograd does the rest.
    """
    meta = [tensor.detach().requires_grad_() for tensor in meta]
    coefficients = tabulate(meta, config).to(meta[0].dtype)
    inner, outer = (noise.transpose(1, 2) for noise in noises)  # (replicas, units, steps)
    constants = config["meta_scale"] * (meta[2] @ inner)  # (replicas, 1, steps)
    table, shifts = coefficients.detach(), outer + constants.detach()
    differentiated = differentiate_in_c if engine == "c" else differentiate
    losses, p, of_table, of_constants = differentiated(table, p, batches, shifts, config)
    gradients = torch.autograd.grad([coefficients, constants], meta, [of_table, of_constants[:, None]])
    return gradients, losses, p, interpolated(table, config["grid"], engine)


def learn(config, seeds, data, progress, engine):
    """Learn an activation for each seed, as the notebook does: seed -> a record of each outer step."""
    meta, first, later, noises, (inner_test, outer_test) = stack([sample_published(s, config) for s in seeds])
    batches, x_test, y_test = original_batches(config, data)
    records = {seed: [] for seed in seeds}
    for step in range(config["outer_steps"]):
        p = later if step else first
        gradients, losses, p, activation = meta_gradient(meta, p, noises, batches, config, engine)
        gradients = [g.clamp(-config["clamp"], config["clamp"]) for g in gradients]
        shift = outer_test + config["meta_scale"] * (meta[2] @ inner_test[:, :, None])[:, 0]
        test_losses, missed = original_test(activation, p, shift, x_test, y_test)
        norms = sum(g.square().flatten(1).sum(dim=1) for g in gradients)
        for k, own in enumerate(records.values()):
            if len(own) < step or not losses[k].isfinite().all():
                continue  # this replica has diverged, and its records end there
            record = original_record(step, losses[k], test_losses[k], missed[k], config)
            own.append(record | {"squared_norm": norms[k].item()})
            if step in config["kept_steps"] or step == config["outer_steps"] - 1:
                own[-1]["meta"] = numbers_of(meta, k)
        meta = [tensor - config["outer_lr"] * g for tensor, g in zip(meta, gradients)]
        progress(len(seeds))
    return records


# What the notebook samples and evaluates


def sample_published(seed, config):
    """All that the notebook samples after torch.manual_seed(seed), in its order.

    Returns the network of g; the initial networks of the first and of all other outer steps; and the noise
    within g and that of the hidden units, each (steps, units) of training and (units,) of the last test. The
    notebook evaluates after every step but the first, and that takes noise, too. Without an activation to be
    learned, neither g nor its noise is sampled.
    """
    generator, learned = torch.Generator().manual_seed(seed), "meta_hidden" in config
    meta = sample_learned(generator, config) if learned else None
    first = sample_networks([generator], config["hidden"])
    generator.manual_seed(seed)
    noise = {"train": [], "test": []}
    for step in range(config["inner_steps"]):
        for split in ("train", "test") if step else ("train",):
            sizes = [config["meta_hidden"], config["hidden"]] if learned else [config["hidden"]]
            own = [config["noise"] * (2 * torch.rand(n, generator=generator) - 1) for n in sizes]
            noise[split].append(own if learned else [torch.zeros(1), *own])
    if learned:  # to plot the function, the notebook evaluates it once more
        torch.rand(config["meta_hidden"], generator=generator)
    later = sample_networks([generator], config["hidden"])
    inner, outer = (torch.stack(each) for each in zip(*noise["train"]))
    return meta, first, later, (inner, outer), noise["test"][-1]


def stack(samples):
    """What sample_published gives for each seed, as tensors (replicas, ...)."""
    metas, firsts, laters, noises, tests = zip(*samples)
    metas = [torch.stack(each) for each in zip(*metas)] if metas[0] is not None else None
    firsts, laters = ({k: torch.cat([p[k] for p in each]) for k in each[0]} for each in (firsts, laters))
    noises, tests = ([torch.stack(each) for each in zip(*both)] for both in (noises, tests))
    return metas, firsts, laters, noises, tests


def original_batches(config, data, dtype=torch.float32):
    """The batches of the notebook, and the first 500 test examples, which it evaluates."""
    x, y, x_test, y_test = (torch.tensor(data[name]) for name in ("x", "y", "x_test", "y_test"))
    batches = make_batches(config, [None], x.T.to(dtype), y)
    return batches, x_test[:500].T.to(dtype), y_test[:500]


@torch.no_grad()
def original_test(activation, p, shift, x, y):
    """The test loss of each network and how many examples it misses, with noise, as in the notebook."""
    values, _ = activation(mnist1d.linear(p, "hidden", x.expand(len(p["out_bias"]), -1, -1)))
    logits = mnist1d.linear(p, "out", values + shift[:, :, None])
    return mnist1d.cross_entropy(logits, y).tolist(), (logits.argmax(dim=1) != y).sum(dim=1).tolist()


def original_record(step, losses, test_loss, missed, config, n=500):
    """The record of one network in the notebook's reading: its test error, and its losses in training."""
    passes = config["inner_steps"] * config["batch_size"] * 10 // (config["num_samples"] * 8)
    record = {"step": step} | runs.evaluation(passes, "test", test_loss, missed, n)
    late = losses[-config["late"] :].mean().item()
    return record | {"late_loss": late, "mean_loss": losses.mean().item(), "final_loss": losses[-1].item()}


# What makes it fast. The learned function depends on one number. So it is evaluated on a grid, once per outer
# step, and the inner training interpolates it, instead of computing 100 tanh for each of 12,800 units in each
# step. Cubic Hermite polynomials have the one derivative that the inner gradient needs, and the two that the
# outer one needs.


def tabulate(meta, config):
    """The coefficients (replicas, cells, 4) of the cubic Hermite polynomials of the learned functions.

    The first and the last cell are straight lines, which go on beyond the grid. All in double precision:
    the curvature of a cell is a small difference of large values.
    """
    low, high, density = config["grid"]
    nodes = torch.linspace(low, high, (high - low) * density + 1, dtype=torch.float64)
    values, slopes = evaluate_learned([tensor.double() for tensor in meta], nodes, config)
    slopes = slopes / density
    rise, left, right = values.diff(dim=1), slopes[:, :-1], slopes[:, 1:]
    inner = torch.zeros(len(nodes) - 1, dtype=nodes.dtype)
    inner[1:-1] = 1
    third = (left + right - 2 * rise) * inner
    second = (3 * rise - 2 * left - right) * inner
    return torch.stack([values[:, :-1], rise - second - third, second, third], dim=2)


class Interpolate(torch.autograd.Function):
    """Values and slopes of curves at points; the gradient of the coefficients is added to `gradient`.

    The definition; `InterpolateInC` is the same, faster. `coefficients` is (replicas, cells, 4).
    """

    @staticmethod
    def forward(ctx, points, coefficients, gradient, grid):
        low, _, density = grid
        replicas, cells, _ = coefficients.shape
        position = (points - low) * density
        cell = position.nan_to_num(0).clamp(0, cells - 1).long()  # so that NaN stays NaN in u
        u = position - cell
        rows = (cell.flatten(1) + cells * torch.arange(replicas)[:, None]).flatten()
        c0, c1, c2, c3 = coefficients.flatten(0, 1)[rows].unbind(1)
        c0, c1, c2, c3 = (c.view_as(u) for c in (c0, c1, c2, c3))
        slopes = (c1 + u * (2 * c2 + 3 * u * c3)) * density
        ctx.save_for_backward(u, rows, slopes, (2 * c2 + 6 * u * c3) * density**2)
        ctx.gradient, ctx.density = gradient, density
        return c0 + u * (c1 + u * (c2 + u * c3)), slopes

    @staticmethod
    def backward(ctx, of_values, of_slopes):
        u, rows, slopes, curvatures = ctx.saved_tensors
        if ctx.gradient is not None:
            powers = torch.stack([torch.ones_like(u), u, u**2, u**3], dim=-1)
            derivatives = torch.stack([torch.zeros_like(u), torch.ones_like(u), 2 * u, 3 * u**2], dim=-1)
            added = of_values[..., None] * powers + ctx.density * of_slopes[..., None] * derivatives
            ctx.gradient.view(-1, 4).index_add_(0, rows, added.reshape(-1, 4))
        return of_values * slopes + of_slopes * curvatures, None, None, None


class InterpolateInC(torch.autograd.Function):
    """The same, but only values are differentiated, and only with respect to the points."""

    @staticmethod
    def forward(ctx, points, coefficients, gradient, grid):
        kernel = training_in_c()
        values, slopes = kernel.interpolate(coefficients, (grid[0], grid[2]), points.contiguous())
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(slopes)
        return values, slopes

    @staticmethod
    def backward(ctx, of_values, of_slopes):
        return of_values * ctx.saved_tensors[0], None, None, None


@functools.cache
def training_in_c(hidden=128, examples=100):
    return InnerTraining(40, hidden, 10, examples)


def interpolated(coefficients, grid, engine, gradient=None):
    """The activation of a table of coefficients, whose gradient is added to `gradient`."""
    interpolate = InterpolateInC if engine == "c" else Interpolate
    return lambda points: interpolate.apply(points, coefficients, gradient, grid)


def differentiate(table, p, batches, shifts, config):
    """Train networks with the curves of a table (replicas, cells, 4), and differentiate the outer loss.

    Returns the losses, the last parameters, and the gradients of the outer loss with respect to the table and
    to a constant that is added to the activation in each step, (replicas, steps).
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (shifts, *p.values())]
    of_table = torch.zeros_like(table)
    activation = interpolated(table, config["grid"], "torch", of_table)
    losses, last = train_inner(activation, dict(zip(p, leaves[1:])), batches, leaves[0], config["lr"], config)
    outer = losses[:, -config["late"] :].mean(dim=1).sum()
    # p is asked for, too, or the backward pass would leave out the curves of step 0, which depend on no leaf
    of_shifts = torch.autograd.grad(outer, leaves)[0]
    last = {name: tensor.detach() for name, tensor in last.items()}
    return losses.detach(), last, of_table, of_shifts.sum(dim=1)


def differentiate_in_c(table, p, batches, shifts, config):
    """The same, about three times as fast."""
    kernel = training_in_c(config["hidden"], config["batch_size"])
    signals, labels = kernel.pad(*map(torch.cat, zip(*batches)))
    numbers = config["late"], config["lr"], config["mean_square"], config["epsilon"]
    grid, found = (config["grid"][0], config["grid"][2]), []
    for k, (own, shift) in enumerate(zip(table, shifts)):
        initial = torch.cat([tensor[k].flatten() for tensor in p.values()])
        shift = shift.T.contiguous()
        found.append(kernel.differentiate(own.contiguous(), grid, signals, labels, shift, initial, *numbers))
    losses, last, of_table, of_constants = map(torch.stack, zip(*found))
    last = last.split([tensor[0].numel() for tensor in p.values()], dim=1)
    last = {name: own.view_as(tensor) for (name, tensor), own in zip(p.items(), last)}
    return losses, last, of_table, of_constants
