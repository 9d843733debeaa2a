"""What the two studies of myth 6 share beside studies/mixers.py: the optimizer and the choice of its rate."""

import math

import torch

from records.run import read_run
from studies import common

CHOOSING_SEEDS = 100, 101  # no reported network begins with these initial weights


def make_optimizer(parameters, config):
    """AdamW for the parameters (replicas, ...) by name. It works elementwise, so one serves all replicas."""
    return torch.optim.AdamW(
        parameters.values(), config["lr"], weight_decay=config["weight_decay"], fused=True
    )


def set_rate(optimizer, config, done):
    """The rate after the share `done` of the updates: it rises linearly, and then falls as a cosine does."""
    share = min(done / config["warmup"], (1 + math.cos(math.pi * done)) / 2)
    optimizer.param_groups[0]["lr"] = config["lr"] * share


def choose(config, seeds, train, keys):
    """Try candidates as common.choose does: seed -> the records of them all, each with its values of `keys`.

    `train(config, seeds)` returns seed -> records, of which the last is that of the validation examples.
    """
    records = {seed: [] for seed in seeds}

    def misses_of(candidate):
        found = train(candidate, seeds)
        for seed, own in found.items():
            records[seed] += [{**{key: candidate[key] for key in keys}, **record} for record in own]
        return sum(own[-1]["misses"] for own in found.values())

    common.choose(config, misses_of, *keys[1:])
    return records


def validation_misses(folder, name, keys):
    """The values of `keys` -> the validation misses of both seeds with them, in the run `choose-<name>`."""
    misses = {}
    for records in read_run(folder / f"choose-{name}.jsonl").records.values():
        for record in (record for record in records if record["split"] == "validation"):
            values = tuple(record[key] for key in keys)
            misses[values] = misses.get(values, 0) + record["misses"]
    return misses


def best_values(folder, names, keys):
    """name -> the values of `keys` with the fewest validation misses; of equals, the lowest."""
    found = {}
    for name in names:
        misses = validation_misses(folder, name, keys)
        found[name] = dict(zip(keys, min(misses, key=lambda values: (misses[values], values))))
    return found
