"""MNIST-1D's networks and Forward-Forward as Models of the Recipe."""

import sys

import numpy as np
import torch

import forward_forward as ff
import mnist1d_gen
import prepro
from studies import mnist1d, spatial_priors
from studies.recipe.model import Data, Model, Remember, losses_of

KINDS = "mlp", "cnn", "gru"


def mnist1d_model(kind, data=None, draw=None, data_root=None, engine=None):
    """The MLP, CNN or GRU of studies/spatial_priors.py on ordered signals; only PyTorch trains them."""
    name = {"mlp": "mlp-100"}.get(kind, kind)
    config = spatial_priors.make_config(name, "ordered")
    stacked_forward, shapes = spatial_priors.MODELS[name]

    def stack(network):
        return {name: tensor[None] for name, tensor in network.items()}

    def unstack(parameters):
        return {name: tensor[0].detach().clone().requires_grad_() for name, tensor in parameters.items()}

    def forward(network, x):
        return stacked_forward(stack(network), x.T[None])[0].T

    def change(config, n, passes, changes, lr_scale=1.0):
        own = config | changes
        own |= {"lr": lr_scale * own["lr"], "batch_size": min(own["batch_size"], n)}
        each = -(-n // own["batch_size"])
        return own | {"steps": passes * each - 1 if passes else config["steps"]}, each

    def train(x, y, seed=0, passes=None, regularise=True, lr_scale=1.0, watch=None, engine=None, **changes):
        own, each = change(config, len(y), passes, changes, lr_scale)
        parameters = mnist1d.init_parameters(shapes, [seed])
        for step in mnist1d.train_as_published(stacked_forward, parameters, x.T, y, own):
            if watch and (step + 1) % each == 0:
                watch((step + 1) // each, unstack(parameters))
        return unstack(parameters)

    def together(seeds, x, y, passes):
        parameters = mnist1d.init_parameters(shapes, seeds)
        own, _ = change(config, len(y), passes, {})
        for _ in mnist1d.train_as_published(stacked_forward, parameters, x.T, y, own):
            pass
        return [unstack({name: p[k : k + 1] for name, p in parameters.items()}) for k in range(len(seeds))]

    def run(data, seed=0, passes=None):
        own, _ = change(config, len(data.train_y), passes, {})
        splits = dict(zip(("x", "y", "x_test", "y_test"), (tensor.numpy() for tensor in data[:4])))
        records = spatial_priors.train(own, [seed], splits, lambda n: None)[seed]
        return train(data.train_x, data.train_y, seed, passes), records

    def evaluate(network, x, y):
        (loss,), (misses,) = mnist1d.evaluate(stacked_forward, stack(network), x.T, y)
        return loss, sum(misses)

    def see(x, seed):
        given, y = [], torch.zeros(len(x), dtype=torch.int64)
        own, _ = change(config, len(x), 1, {})

        def pass_on(p, signals):
            given.append(signals[0].T)
            return stacked_forward(p, signals)

        for _ in mnist1d.train_as_published(pass_on, mnist1d.init_parameters(shapes, [seed]), x.T, y, own):
            pass
        return torch.cat(given)

    def load():
        arrays = mnist1d_gen.make_dataset(seed=config["data_seed"])
        (train_x, train_y), (test_x, test_y) = spatial_priors.make_splits(config, arrays).values()
        facts = {"data": "mnist1d", "sha256": mnist1d_gen.sha256(arrays)}
        return Data(train_x.T.contiguous(), train_y, test_x.T.contiguous(), test_y, facts)

    return Model(
        name=f"mnist1d-{kind}",
        load=load,
        make=lambda seed: unstack(mnist1d.init_parameters(shapes, [seed])),
        forward=forward,
        losses=losses_of("cross-entropy"),
        train=train,
        evaluate=evaluate,
        loss="cross-entropy",
        config=config,
        passes=(config["steps"] + 1) * config["batch_size"] // 4000,
        see=see,
        lr=lambda number, passes: config["lr"],
        run=run,
        together=together,
        engines=("torch",),
        first=next(iter(shapes)),
        last=("out_weight", "out_bias"),
    )


# Forward-Forward: forward_forward.py


def forward_forward_model(data="auto", draw=None, data_root=None, engine="auto"):
    """forward_forward.py with its default config, on MNIST where it is to be had, else on strokes."""
    if data == "auto":
        try:
            data = "mnist" if prepro.load_whole_mnist(data_root) else data
        except prepro.Unavailable as error:
            print(f"NOTICE: {error}. Procedural digits (strokes) are used instead.", file=sys.stderr)
            data = "strokes"
    config = ff.make_config("ours", data, precision=ff.pick_precision("auto", "cpu"))
    splits, shape, sha256 = ff.load(data, data_root)
    usual, name = ff.pick_engine(engine, "cpu", config.precision)

    def as_network(network):
        return {name: own.clone().requires_grad_() for name, own in network.state_dict().items()}

    def as_layers(network):
        """forward_forward's Network with these parameters; they keep their gradients."""
        own = ff.Network(len(network["weights1"]), config, 0, usual)
        own.head = network["head"]
        for number, layer in enumerate(own.layers, start=1):
            layer.weights, layer.biases = network[f"weights{number}"], network[f"biases{number}"]
            layer.weights_lowp = layer.weights.detach().to(usual.dtype, copy=True)
        return own

    def train(x, y, seed=0, passes=None, regularise=True, lr_scale=1.0, watch=None, engine=None, **changes):
        if not regularise:
            changes = {"jitter": 0, "weight_decay": 0.0, "head_weight_decay": 0.0, "peer": 0.0} | changes
        own = config._replace(passes=passes or config.passes)._replace(**changes)
        own = own._replace(lr=lr_scale * own.lr, head_lr=lr_scale * own.head_lr)
        chosen, _ = ff.pick_engine(engine or name, "cpu", own.precision)
        torch.backends.mkldnn.enabled, network = True, None  # repro.py switches it off, and bfloat16 needs it
        for number in range(own.passes):  # as in forward_forward.train, which shows nobody its network
            with torch.inference_mode():
                if network is None:
                    network = ff.Network(x.shape[1], own, seed, chosen)
                    inputs, threads = x.to(chosen.dtype), ff.Threads(1)
                    unsure = torch.ones(len(y), dtype=torch.bool)
                ff.train_pass(network, inputs, y, shape, seed, number, threads, unsure)
            if watch:
                watch(number + 1, as_network(network))
        return as_network(network)

    def run(data, seed=0, passes=None):
        torch.backends.mkldnn.enabled = True
        own = config._replace(passes=passes or config.passes)
        pairs = {"train": (data.train_x, data.train_y), "test": (data.test_x, data.test_y)}
        records, network = ff.train(own, seed, pairs, shape, usual)
        return as_network(network), records

    @torch.inference_mode()
    def evaluate(network, x, y):
        torch.backends.mkldnn.enabled = True
        network = {name: tensor.detach() for name, tensor in network.items()}
        return ff.evaluate(as_layers(network), x.to(usual.dtype), y)[:2]

    def see(x, seed):
        with Remember("matmul", "__matmul__") as remember:
            train(x, torch.zeros(len(x), dtype=torch.int64), seed, 1, precision="fp32")
        first = (x.shape[1], config.width)
        given = [args[0] for args in remember.inputs if args[1].shape == first]
        order = ff.sample_pass(config, seed, 0, torch.ones(len(x), dtype=torch.bool))[0]
        return torch.cat(given).float()[order.argsort()]

    pairs = [tensor for split in ("train", "test") for tensor in splits[split]]
    rows = {f"{split}_rows": np.arange(len(y)) for split, (_, y) in splits.items() if data == "mnist"}
    facts = {"data": data, "data_root": data_root, "sha256": sha256, "shape": shape, **rows}
    return Model(
        name="forward-forward",
        load=lambda: Data(*pairs, facts),
        make=lambda seed: as_network(ff.Network(pairs[0].shape[1], config, seed, usual)),
        forward=lambda network, x: ff.plain_read_out(as_layers(network), x).sum(dim=0),
        losses=losses_of("cross-entropy"),  # of the answers, as its records have it; no layer is taught by it
        train=train,
        evaluate=evaluate,
        loss="goodness",
        config=config._asdict(),
        passes=config.passes,
        see=see,
        lr=lambda number, passes: config.lr * ff.lr_schedule((number - 1) / passes, config.lr_hold),
        run=run,
        engines=("c", "torch") if name == "c" and engine == "auto" else (name,),
        first="weights1",
    )
