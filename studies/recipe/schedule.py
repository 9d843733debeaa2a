"""Stage 3 of the Recipe, the learning rate: what the training loop uses, and not what the config promises."""

import math
from unittest.mock import patch

import numpy as np

import forward_forward
import modern
import repro
from studies.recipe.model import Result


class Recorder:
    """An engine of repro.py, or the replicas of modern.py, that only writes down the rates it is given."""

    at_a_time = 1000

    def __init__(self, *replicas):
        self.shape, self.rates = replicas, []

    def train_pass(self, *given):
        self.rates.append(given[-1])

    def compute_outputs(self, *given):
        return np.zeros((*self.shape, len(given[-1]), 10), np.float32)


def rates_used(model, data, passes):
    """The rate of each pass as the shipped loop hands it on, and the plan of the config."""
    n, config = 100, model.config | {"passes": passes}
    x, y = data.train_x[:n], data.train_y[:n]
    if model.name == "modern":
        recorder = Recorder(1)
        modern.train(config, [0], {"train": (x.numpy(), y.numpy())}, lambda _: recorder, every_pass=False)
        steps = [k / max(passes - 1, 1) for k in range(passes)]
        return recorder.rates, [config["lr"] + k * (config["final_lr"] - config["lr"]) for k in steps]
    if model.name == "lecun1989":
        recorder, split = Recorder(), (x.numpy(), y.numpy())
        repro.train(config, 0, {"train": split, "test": split}, recorder)
        return recorder.rates, [config["lr"]] * passes
    if model.loss == "goodness":  # held for a part of training, then a line to 0 where all passes are done
        rates, usual = [], forward_forward.lr_schedule
        with patch.object(forward_forward, "lr_schedule", lambda *a: rates.append(usual(*a)) or rates[-1]):
            model.train(x, y, passes=passes, batch_size=n)
        hold = config["lr_hold"]
        return rates, [min(1, (1 - k / passes) / (1 - hold)) for k in range(passes)]
    before = model.make(0)  # Adam's first step moves a weight by the rate, whatever its gradient
    after = model.train(x, y, seed=0, passes=1)
    moved = max(float((after[name] - before[name]).detach().abs().max()) for name in before)
    return [moved] + [model.lr(number, passes) for number in range(2, passes + 1)], [config["lr"]] * passes


def lr_decay(model, data):
    """A schedule that was written for another number of passes ends too early, or never ends."""
    worst, ends = 0.0, {}
    for passes in (1, 2, 7, 60):
        used, plan = rates_used(model, data, passes)
        worst = max(
            [worst if len(used) == passes else math.inf, *(abs(a / b - 1) for a, b in zip(used, plan))]
        )
        ends[str(passes)] = [float(used[0]), float(used[-1])]
    first, last = ends["60"]
    return Result(
        "the learning rate decays to its end",
        "in every one of 1, 2, 7 or 60 passes, the loop's rate is that of the config's plan, within 0.1%",
        f"of 60 passes, {first:.3g} in the first and {last:.3g} in the last; largest deviation {worst:.1g}",
        worst < 1e-3,
        {"first_and_last": ends, "largest_deviation": worst},
    )
