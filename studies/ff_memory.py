"""How much memory an update takes beside the weights: Forward-Forward against backpropagation, by depth.

    python -m studies.ff_memory                  # half a minute
    python -m studies.ff_memory --device cuda    # by PyTorch's own count on a GPU

It is often said, without numbers, that Forward-Forward needs less memory, because a layer learns as soon as
it has its activities and nothing waits for a backward pass. What would refute this: memory that grows with
depth like that of backpropagation. Four ways to do an update in float32 are compared, on random images:

- backpropagation: every layer's activities are kept for the backward pass
- recomputing: only every k-th layer's are kept, k the square root of the depth; others are computed again
- forward-forward: a layer learns, and its activities are dropped as soon as the next one has read them
- forward-forward, as in the script: forward_forward.py, which has activities and gradients of all at once

A gradient is used and dropped as soon as it is known, except in the last. An image is two examples to
Forward-Forward, a positive and a negative.
"""

import contextlib
import functools
import sys
import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forward_forward as ff
import utils
from records import figures
from records.tables import markdown_table, read_runs
from studies import common
from studies.ff_common import network_config
from studies.ff_sleep import learn
from studies.ff_sweep import BASE

PAGE = utils.ROOT / "results" / "ff_memory" / "README.md"
CONFIG = BASE | {"width": 500, "batch_size": 1000, "negatives": "random", "passes": 1, "lr": 0.01}
CONFIG = {field: CONFIG[field] for field in ff.Config._fields if field in CONFIG and field != "layers"}
CONFIG |= {"data": "random", "validation": 0, "depths": [2, 4, 8, 16, 32, 64]}
SMOKE = {"width": 20, "batch_size": 10, "depths": [2, 4]}


# Counting bytes


class Tally(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside the block: those alive now, and most at a time.

    What PyTorch allocates inside one operation and frees before its end is not seen.
    """

    def __enter__(self):
        self.live, self.peak, self.sizes = 0, 0, {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self.sizes:  # neither a view nor a change in place
                self.sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, key)
        return result

    def freed(self, key):
        self.live -= self.sizes.pop(key, 0)


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(update, device):
    """The most that an update takes beside what was there before; the second one, with optimiser state."""
    update()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with Tally() as tally:
        update()
    return tally.peak


# The updates


def layer_by_layer(images, labels, config):
    network = ff.Network(images.shape[1], config, 0, device=images.device)
    both = torch.cat([labels, (labels + 1) % ff.LABELS])
    positive = torch.arange(len(both), device=images.device) < len(labels)
    return lambda: learn(network, images, both, positive)


def as_in_the_script(images, labels, config):
    network = ff.Network(images.shape[1], config, 0, device=images.device)
    threads, unsure = ff.Threads(1), torch.ones(len(labels), dtype=torch.bool, device=images.device)
    return lambda: ff.train_pass(network, images, labels, None, 0, 0, threads, unsure)


def backpropagation(images, labels, config, recompute=False):
    """Gradient descent with momentum, which uses each gradient as soon as it is known."""
    sizes = [images.shape[1], *[config.width] * config.layers]
    layers = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
    model = nn.Sequential(*layers, nn.Linear(config.width, ff.LABELS)).to(images.device)
    optimizers = {p: torch.optim.SGD([p], 1e-3, momentum=0.9) for p in model.parameters()}

    def use(parameter):
        optimizers[parameter].step()
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(use)

    def update():
        if recompute:
            parts = round(len(model) ** 0.5)
            logits = checkpoint.checkpoint_sequential(model, parts, images, use_reentrant=False)
        else:
            logits = model(images)
        F.cross_entropy(logits, labels).backward()

    return update


METHODS = {
    "backpropagation": backpropagation,
    "recomputing": functools.partial(backpropagation, recompute=True),
    "forward-forward": layer_by_layer,
    "forward-forward, as in the script": as_in_the_script,
}


def measure(config, seed, progress, device="cpu"):
    """A record for every depth and method."""
    generator, records = torch.Generator().manual_seed(seed), []
    images = torch.rand(config["batch_size"], 784, generator=generator).to(device)
    labels = torch.randint(ff.LABELS, (config["batch_size"],), generator=generator).to(device)
    for depth in config["depths"]:
        own = network_config({**config, "layers": depth})
        weights = 784 * own.width + (depth - 1) * own.width**2
        for method, prepare in METHODS.items():
            progress(0)
            by_autograd = "forward" not in method
            with contextlib.nullcontext() if by_autograd else torch.inference_mode():
                peak = peak_bytes(prepare(images, labels, own), device)
            point = {"method": method, "layers": depth, "peak_bytes": peak}
            records.append(point | {"weights_and_momentum_bytes": 2 * 4 * weights})
    return records


def tables(folder=PAGE.parent):
    """The page's tables, name -> Markdown: a row for every depth, in megabytes (10^6 bytes)."""
    found = {}
    for name, run in read_runs(folder).items():
        rows = {}
        for record in run.records[min(run.records)]:
            row = rows.setdefault(record["layers"], [record["layers"]])
            row.append(f"{record['peak_bytes'] / 1e6:.1f}")
            if len(row) == len(METHODS) + 1:
                row.append(f"{record['weights_and_momentum_bytes'] / 1e6:.1f}")
        head = ["layers", *(f"{method} (MB)" for method in METHODS), "weights and momentum (MB)"]
        found[name] = markdown_table(head, rows.values())
    return found


def plot(folder, name):
    run, curves = read_runs(folder)[name], {method: {} for method in METHODS}
    for record in run.records[min(run.records)]:
        curves[record["method"]][record["layers"]] = [record["peak_bytes"] / 1e6]
    title = f"{run.config['width']} units a layer, {run.config['batch_size']} images"
    figure = figures.scaling({title: curves}, {}, "layers", "peak beside weights and momentum (MB)")
    figure.axes[0].set_xticks(run.config["depths"], run.config["depths"])
    figure.axes[0].set_xticks([], minor=True)
    figures.save(figure, folder / f"{name}.png")


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("ff_memory", __doc__, seeds=1, without=("data_root", "engine", "threads"))
    args = common.parse(parser, argv)
    utils.require_device(args.device)
    torch.set_num_threads(1)
    name, config = args.device, CONFIG | (SMOKE if args.smoke else {})
    args.threads = 1  # PyTorch's count on a GPU is of all threads together
    common.run_configs(
        args, "ff_memory", {name: config}, functools.partial(measure, device=args.device), engine="torch"
    )
    plot(args.out, name)
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
