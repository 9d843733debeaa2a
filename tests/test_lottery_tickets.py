"""studies/lottery_tickets.py and its C kernel, against torch.nn in double precision and scripted networks."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_sanitizers_find_nothing, one_sentence, run_study
from torch import nn

import mnist1d_gen
import utils
from kernels import build, sparse_mlp
from records import run as runs
from records import tables
from studies import common
from studies import lottery_page as page
from studies import lottery_tickets as study

generate = functools.cache(mnist1d_gen.make_dataset)
CONFIG = study.make_config("smallest", 5, rounds=(0, 50, 80, 91, 98)) | {"steps": 8}


@pytest.fixture(scope="module", autouse=True)
def compiler():
    """Almost everything here holds the kernel against PyTorch."""
    try:
        sparse_mlp.load()
    except build.Unavailable as error:
        pytest.skip(str(error))


def networks(masks, seed=0, size=100, n=4000, of=("c", "torch")):
    """name -> the network with its first n training examples, by each engine"""
    found = {}
    for engine in of:
        network, examples = study.ENGINES[engine]
        x, y = generate()["x"][:n], generate()["y"][:n]
        found[engine] = network(study.initial_matrices(seed), masks), examples(x, y, size)
    return found


def sampled_masks(density, seed=0, ordered=True):
    if density == 1:
        return [np.ones_like(matrix, bool) for matrix in study.initial_matrices(0)]
    return study.random_masks(1 - density, seed, 1)


class Residual(nn.Module):
    """The published network in torch.nn, in double precision, with the weights that masks keep."""

    def __init__(self, matrices, masks):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(m.shape[1] - 1, m.shape[0]).double() for m in matrices)
        for layer, matrix, mask in zip(self.layers, matrices, masks):
            matrix = torch.from_numpy(matrix * mask).double()
            layer.weight.data, layer.bias.data = matrix[:, :-1].contiguous(), matrix[:, -1].contiguous()

    def forward(self, x):
        h = torch.relu(self.layers[0](x))
        return self.layers[2](h + torch.relu(self.layers[1](h)))

    def gradients(self):
        return [torch.cat([own.weight.grad, own.bias.grad[:, None]], dim=1).numpy() for own in self.layers]


def relative_error(ours, true):
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(ours, true, strict=True))


# The kernel


@pytest.mark.quick
@pytest.mark.parametrize("density", [1, 0.3, 0.16, 0.08, 0.01])
@pytest.mark.parametrize("size", [1, 100, 104, 250])
def test_gradients_and_loss_are_those_of_double_precision(density, size):
    """Batches that end before, at and after the end of a tile. The first mean of Adam is a tenth of the
    gradient. Measured: 8e-7 at most."""
    masks, n = sampled_masks(density), 2 * size
    own, examples = networks(masks, size=size, n=n)["c"]
    own.train(examples, 1, 0.0)
    module = Residual(study.initial_matrices(0), masks)
    x, y = (torch.from_numpy(generate()[name][:n]) for name in "xy")
    x = x.float().double()
    F.cross_entropy(module(x[:size]), y[:size]).backward()
    true = [gradient * mask for gradient, mask in zip(module.gradients(), masks)]
    assert relative_error(own.matrices("mean"), [gradient / 10 for gradient in true]) < 5e-6
    squares = [gradient**2 / 1000 for gradient in true]
    assert relative_error(own.matrices("square"), squares) < 1e-5
    loss, misses = own.evaluate(examples)
    with torch.no_grad():
        logits = module(x)
    assert loss == pytest.approx(F.cross_entropy(logits, y).item(), rel=2e-6)
    assert abs(misses - int((logits.argmax(1) != y).sum())) <= 1


@pytest.mark.quick
def test_a_wrong_gradient_would_be_noticed():
    masks = sampled_masks(0.08)
    own, examples = networks(masks)["c"]
    own.train(examples, 1, 0.0)
    module = Residual(study.initial_matrices(0), masks)
    x, y = (torch.from_numpy(generate()[name][100:200]) for name in "xy")  # another batch
    F.cross_entropy(module(x), y).backward()
    assert relative_error(own.matrices("mean"), [g / 10 for g in module.gradients()]) > 0.1


@pytest.mark.parametrize("density, steps", [(1, 4), (0.3, 6), (0.08, 12), (0.02, 45)])
def test_training_is_that_of_pytorch(density, steps):
    """In two parts, the longest more than once through the data. Where a gradient is almost 0, Adam makes a
    whole step of its sign, so losses drift apart later on: measured over eight seeds, by 8e-5 at most."""
    found = networks(sampled_masks(density), seed=1)
    for network, examples in found.values():
        network.train(examples, steps // 2, 2e-2)
        network.train(examples, steps - steps // 2, 2e-2)
    (ours, misses), (true, true_misses) = (network.evaluate(e) for network, e in found.values())
    assert ours == pytest.approx(true, rel=1e-3) and abs(misses - true_misses) < 20
    ours, true = (network.matrices() for network, _ in found.values())
    assert relative_error(ours, true) < 0.02
    start = [matrix * mask for matrix, mask in zip(study.initial_matrices(1), sampled_masks(density))]
    assert relative_error(start, true) > 0.2  # so that something has been learned


@pytest.mark.quick
@pytest.mark.parametrize("engine", ["c", "torch"])
def test_a_removed_weight_never_moves(engine):
    masks = sampled_masks(0.08)
    masks[0][7], masks[1][:, 9], masks[2][:, -1] = False, False, False  # a unit, an input, all biases
    network, examples = networks(masks, of=[engine])[engine]
    for _ in range(2):
        network.train(examples, 3, 2e-2)
        for matrix, mask, initial in zip(network.matrices(), masks, study.initial_matrices(0)):
            assert (matrix[~mask] == 0).all() and (matrix[mask] != initial[mask]).mean() > 0.5


@pytest.mark.quick
def test_both_engines_know_a_network_without_weights():
    """As in the last round of the full schedule: the loss is that of chance."""
    masks = [np.zeros_like(mask) for mask in sampled_masks(1)]
    for network, examples in networks(masks, n=200).values():
        network.train(examples, 2, 2e-2)
        assert network.evaluate(examples)[0] == pytest.approx(np.log(10))


@pytest.mark.quick
def test_the_order_of_the_weights_is_a_permutation(monkeypatch):
    """With blocks and without, every weight that is kept is found at the place that both orders say."""
    for density, blocks in ((1, 8), (0.5, 8), (0.05, 1), (0, 1)):
        mask = np.random.default_rng(1).random((500, 501)) < density
        order = sparse_mlp._order(mask)
        assert (order["column_blocks"], order["row_blocks"]) == (blocks, blocks)
        rows, columns = order["rows"], order["columns"]
        again = np.zeros_like(mask)
        again[rows, columns] = True
        assert np.array_equal(again, mask) and len(rows) == mask.sum()
        assert np.array_equal(rows[order["place"]], order["row"])
        for starts, count in (("row_start", 500), ("column_start", 501)):
            assert len(order[starts]) == blocks * count + 1 and order[starts][-1] == len(rows)


@pytest.mark.quick
def test_what_the_kernel_refuses():
    matrices, masks = study.initial_matrices(0), sampled_masks(0.1)
    x, y = generate()["x"][:200], generate()["y"][:200]
    with pytest.raises(ValueError, match="those of a residual MLP"):
        sparse_mlp.SparseMlp(matrices[::-1], masks)
    with pytest.raises(ValueError, match="not bool"):
        sparse_mlp.SparseMlp(matrices, [mask.astype(float) for mask in masks])
    with pytest.raises(ValueError, match="not bool of float32"):
        sparse_mlp.SparseMlp([matrix.astype(float) for matrix in matrices], masks)
    with pytest.raises(ValueError, match="do not divide 200"):
        sparse_mlp.Examples(x, y, 150)
    with pytest.raises(ValueError, match="0 to 9"):
        sparse_mlp.Examples(x, y + 1, 100)
    network = sparse_mlp.SparseMlp(matrices, masks)
    with pytest.raises(ValueError, match="39 inputs and not 40"):
        network.evaluate(sparse_mlp.Examples(x[:, 1:], y, 100))
    bad = sparse_mlp.Examples(np.where(np.arange(40) == 3, np.nan, x), y, 100)
    with pytest.raises(FloatingPointError):
        network.train(bad, 5, 2e-2)


# The method


@pytest.mark.quick
def test_sizes_are_the_published_ones():
    initial = study.initial_matrices(0)
    assert [matrix.size for matrix in initial] == [20_500, 250_500, 5_010]
    masks = study.keep_largest([np.abs(matrix) for matrix in initial], study.SCHEDULE[study.TICKET])
    assert [int(mask.sum()) for mask in masks] == [1657, 20_243, 405]
    shuffled = study.orders_of_signals(study.CONFIGS["step-1000"])["shuffled"]
    assert shuffled[:7].tolist() == [22, 20, 25, 4, 10, 15, 28]
    assert study.SCHEDULE[list(study.COARSE)][-1] == pytest.approx(0.99, abs=1e-3)


@pytest.mark.quick
def test_the_smallest_scores_are_removed_layer_by_layer():
    scores = [np.array([[3.0, 1, 2], [0, 5, 4]]), np.array([[10.0, 20]])]
    masks = study.keep_largest(scores, 0.5)
    assert masks[0].tolist() == [[True, False, False], [False, True, True]]
    assert masks[1].tolist() == [[False, True]]
    assert all(mask.all() for mask in study.keep_largest(scores, 0.1))  # int(0.1 * 6) is 0
    assert not any(mask.any() for mask in study.keep_largest(scores, 1))


class Scripted:
    """A network that notes its masks, and whose weights after step s are those of a generator seeded by s."""

    seen, starts = [], []

    def __init__(self, matrices, masks):
        self.masks, self.steps = masks, 0
        Scripted.seen.append(masks)
        Scripted.starts.append(matrices)

    def train(self, examples, steps, lr):
        self.steps += steps

    def evaluate(self, examples):
        return 1.0, self.steps

    def matrices(self):
        generator = np.random.default_rng([self.steps, len(Scripted.seen)])
        return [generator.normal(size=mask.shape) * mask for mask in self.masks]


@pytest.fixture
def scripted(monkeypatch):
    Scripted.seen, Scripted.starts = [], []
    monkeypatch.setitem(study.ENGINES, "scripted", (Scripted, study.TorchExamples))
    return Scripted


@pytest.mark.quick
def test_masks_are_nested_and_made_of_the_weights_of_the_step_that_decides(scripted):
    for prune_after in (1000, 1501):
        scripted.seen.clear()
        config = study.make_config("smallest", prune_after, rounds=(0, 50, 80, 91, 98, 99))
        records = study.train(config, 0, "scripted", lambda n: None)
        assert all(mask.all() for mask in scripted.seen[0]) and not any(m.any() for m in scripted.seen[-1])
        for round_, (before, after) in enumerate(itertools.pairwise(scripted.seen), start=1):
            generator = np.random.default_rng([prune_after + 1, round_])
            for one, two in zip(before, after):
                weights = np.abs(generator.normal(size=one.shape))
                assert not (two & ~one).any() and one.sum() > two.sum()
                if two.any():
                    assert weights[two].min() >= weights[one & ~two].max()
        tests = [record for record in records if record["split"] == "test" and "round" in record]
        assert [record["misses"] for record in tests] == 6 * [1501 % 1000 + 1000]  # evaluated at step 1,500
        assert [sum(record["kept"]) for record in tests] == [
            sum(int(mask.sum()) for mask in masks) for masks in scripted.seen
        ]


@pytest.mark.quick
def test_every_round_begins_with_the_initial_weights(scripted):
    study.train(CONFIG, 3, "scripted", lambda n: None)
    for start in scripted.starts:
        for ours, initial in zip(start, study.initial_matrices(3)):
            assert np.array_equal(ours, initial)


@pytest.mark.quick
def test_random_masks_are_new_in_each_round_and_trial(scripted):
    config = study.make_config("random", None, rounds=(80, 91))
    for seed in (0, 1):
        study.train(config, seed, "scripted", lambda n: None)
    assert [[int(mask.sum()) for mask in masks] for masks in scripted.seen[1::2]] == 2 * [[1657, 20_243, 405]]
    kept = [masks[1] for masks in scripted.seen]
    for one, two in itertools.combinations(kept, 2):
        share = (one & two).sum() / min(one.sum(), two.sum())
        assert share == pytest.approx(max(one.mean(), two.mean()), abs=0.01)  # as by chance


@pytest.mark.quick
def test_the_conditions_of_the_transfer(scripted):
    """Which masks, weights and signals each of them has."""
    config = study.CONFIGS["step-1000"] | {"rounds": [91], "transfer_steps": 4}
    records = study.train(config, 5, "scripted", lambda n: None)
    own, new = study.initial_matrices(5), study.initial_matrices(config["new_weights_seed"] + 5)
    ticket, masks, starts = scripted.seen[0], scripted.seen[1:], scripted.starts[1:]
    transferred = [record for record in records if "network" in record]
    assert len(transferred) == len(masks) == 10 and not np.array_equal(own[0], new[0])
    for record, mask, start in zip(transferred, masks, starts):
        expected = own if record["weights"] == "own" else new
        assert all(np.array_equal(a, b) for a, b in zip(start, expected))
        same = all(np.array_equal(a, b) for a, b in zip(mask, ticket))
        assert same == (record["network"] == "ticket")
        assert (mask[1].mean() == 1) == (record["network"] == "dense")
        assert record["misses"] == 5 and record["pass"] == 5 * 500 // 4000
    names = [f"{page.condition(record)}_accuracy" for record in transferred]
    assert len(set(names)) == 10 and set(names) < set(records[-1]) and records[-1]["split"] == "test"
    signals = study.orders_of_signals(config)
    assert signals["reversed"].tolist() == list(range(39, -1, -1))
    assert signals["halves swapped"].tolist() == [*range(20, 40), *range(20)]


@pytest.mark.quick
@pytest.mark.parametrize("density", [1, 0.08])
def test_permuted_inputs_are_nothing_to_permuted_weights(density):
    """So that the dense and the random network need not be trained on every order of the signals."""
    order = np.random.default_rng(2).permutation(40)
    network, examples = study.ENGINES["c"]
    losses = []
    for points in (np.arange(40), order):
        columns = [*points, 40]  # the bias stays where it is
        initial, masks = study.initial_matrices(0), sampled_masks(density)
        initial[0], masks[0] = (np.ascontiguousarray(each[0][:, columns]) for each in (initial, masks))
        own = network(initial, masks)
        data = examples(generate()["x"][:500, points], generate()["y"][:500], 100)
        losses.append(own.evaluate(data)[0])
        own.train(data, 3, 2e-2)
        losses.append(own.evaluate(data)[0])
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-4)  # sums are in another order
    assert losses[0] != pytest.approx(losses[1], rel=0.01)
    mixed = network(study.initial_matrices(0), sampled_masks(density))
    assert mixed.evaluate(data)[0] != pytest.approx(losses[0], rel=1e-3)  # permuted signals alone


def test_a_trial_does_not_depend_on_the_others(tmp_path):
    """Bit by bit, two at a time or alone; another seed gives another network."""
    records = {}
    for name, flags in {"both": "--seeds 2 --threads 2", "one": "--seed 1 --seeds 1"}.items():
        out = tmp_path / name
        flags = f"--smoke --quiet --configs random --out {out} {flags}"
        assert study.main(flags.split()) == 0
        records[name] = (out / "random.jsonl").read_text().splitlines()[1:]
    half = len(records["both"]) // 2
    assert records["both"][half:] == records["one"]
    assert records["both"][:half] != records["one"]


# What survives


@pytest.mark.quick
def test_adjacent_weights_are_counted_in_all_windows():
    mask = np.zeros((2, 6), bool)
    mask[0, 1:5] = True
    assert page.adjacent(mask, 2) == 3 / 10 and page.adjacent(mask, 3) == 2 / 8
    assert page.adjacent(mask, 4) == 1 / 6
    random = np.random.default_rng(0).random((20_000, 40)) < 0.3
    for count in (2, 3, 4):
        assert page.adjacent(random, count) == pytest.approx(0.3**count, rel=0.03)


@pytest.mark.quick
@pytest.mark.parametrize("by_unit", [False, True])
def test_both_levels_of_chance_are_those_of_permuted_masks(by_unit):
    """All weights permuted, or those of each unit by themselves; half of the units have few weights."""
    generator = np.random.default_rng(3)
    mask = generator.random((500, 40)) < np.repeat([0.05, 0.4], 250)[:, None]
    counted = {2: [], 3: []}
    for _ in range(60):
        if by_unit:
            permuted = generator.permuted(mask, axis=1)
        else:
            permuted = generator.permutation(mask.flatten()).reshape(mask.shape)
        for count, own in counted.items():
            own.append(page.adjacent(permuted, count))
    for count, own in counted.items():
        expected = page.adjacent_by_chance(mask, count, by_unit)
        assert abs(np.mean(own) - expected) < 4 * np.std(own) / 60**0.5
        assert abs(expected / page.adjacent_by_chance(mask, count, not by_unit) - 1) > 0.3


@pytest.mark.quick
def test_the_published_count_is_the_notebooks():
    """Products of shifted masks, added up, by 40 points; of four, the last is the random mask's."""
    generator = np.random.default_rng(4)
    ticket, random = (generator.random((500, 40)) < 0.3 for _ in range(2))
    shifted = [ticket[:, k : 37 + k].astype(float) for k in range(3)] + [random[:, 3:].astype(float)]
    four = np.mean((shifted[0] * shifted[1] * shifted[2] * shifted[3]).sum(axis=1) / 40)
    assert page.adjacent_as_coded(ticket, random, 4) == pytest.approx(four)
    assert page.adjacent_as_coded(ticket, random, 4) != page.adjacent_as_coded(ticket, ticket, 4)
    two = np.mean((ticket[:, :-1] & ticket[:, 1:]).sum(axis=1) / 40)
    assert page.adjacent_as_coded(ticket, random, 2) == pytest.approx(two)
    assert page.adjacent(ticket, 2) == pytest.approx(two * 40 / 39)


@pytest.mark.quick
def test_a_distance_that_is_preferred_is_found():
    mask = np.random.default_rng(5).random((2000, 40)) < 0.05
    assert page.at_distance(mask, 7) == pytest.approx(1, abs=0.1)
    mask[:, 7:] |= mask[:, :-7]
    assert page.at_distance(mask, 7) > 3 and page.at_distance(mask, 5) == pytest.approx(1, abs=0.1)


@pytest.mark.quick
def test_a_mask_comes_back_from_its_text():
    mask = np.random.default_rng(0).random((500, 40)) < 0.08
    assert np.array_equal(page.unpack(page.pack(mask)), mask)


# The page


def fake_run(name, misses, seeds=3):
    """A run whose accuracy after a round is 100 - misses / 10 - 0.1 seed - the round's number / 10."""
    run = runs.Run(f"{name}.jsonl", "lottery_tickets", {}, "")
    for seed in range(seeds):
        own = run.records[seed] = []
        for number in (0, 50, 91):
            facts = {"round": number, "sparsity": number / 99, "kept": [1, 2, 3]}
            own.append(facts | runs.evaluation(1, "test", 1.0, misses + seed + number, 1000))
            own[-1]["seed"] = seed
        mask = np.zeros((500, 40), bool)
        mask[:, : 4 + seed] = True
        own.append({"split": "mask", "round": 91, "first_layer": page.pack(mask)})
        if name == "step-1000":
            for place, (network, weights, signals) in enumerate(CONDITIONS):
                evaluation = runs.evaluation(1, "test", 1.0, 300 + 10 * place + seed * (place % 2), 1000)
                own.append({"network": network, "weights": weights, "signals": signals, **evaluation})
    return run


CONDITIONS = [("dense", "own", "original"), ("random", "own", "original")]
CONDITIONS += [("ticket", weights, signals) for weights in study.WEIGHTS for signals in study.SIGNALS]


@pytest.fixture(scope="module")
def fake_runs():
    """Of the last step and of all rounds, there are fewer seeds."""
    misses = {"step-1000": 300, "last-step": 310, "random": 400, "all-rounds": 290}
    return {name: fake_run(name, own, 2 if own in (290, 310) else 3) for name, own in misses.items()}


@pytest.mark.quick
def test_the_tables_of_pruning(fake_runs):
    lines = page.pruning_table(fake_runs).splitlines()
    cells = "60.8 ± 0.1 | 59.8 ± 0.1 | 61.8 ± 0.1 | 50.8 ± 0.1"
    assert lines[-1] == f"| 91.9 | 6 | {cells} | 73.0 73.9 75.6 74.4 | 60.5 63.6 60.6 61.8 |"
    lines = page.difference_table(fake_runs).splitlines()
    cell = "-9.1 (-9.1 to -9.1)"
    assert lines[-1] == f"| 91.9 | {' | '.join(4 * [cell])} | -1.0 (-1.0 to -1.0) |"
    some = {name: run for name, run in fake_runs.items() if name in ("step-1000", "random")}
    assert page.difference_table(some).splitlines()[-1] == f"| 91.9 | {cell} | {cell} |"


@pytest.mark.quick
def test_pairs_are_of_the_same_seed():
    one, other = (
        [{"seed": s, "error": e} for s, e in own] for own in ([(1, 30), (2, 20)], [(2, 25), (0, 9)])
    )
    assert page.gains(one, other) == [5]


@pytest.mark.quick
def test_the_tables_of_the_transfer(fake_runs):
    """A condition's misses grow by 10 from one to the next; those of odd ones also with the seed."""
    lines = page.transfer_table(fake_runs).splitlines()
    assert lines[2].startswith("| dense | 70.0 ± 0.0 |  |  | 63.5 64.6 64.5 64.5 64.0 | 64.2")
    assert "| own original ticket | 68.0 ± 0.0 | -2.0 (-2.0 to -2.0) | 0 of 3 | 70.6 | - |" in lines
    reach = 4.302653 * 0.1 / 3**0.5  # Student's t with two degrees of freedom
    more = f"-3.1 ({-3.1 - reach:+.1f} to {-3.1 + reach:+.1f})"
    assert f"| own reversed ticket | 66.9 ± 0.1 | {more} | 0 of 3 | 68.8 | - |" in lines
    assert any(line.startswith("| new original ticket |") and "67.2 | 65.8 65.5" in line for line in lines)
    contrasts = page.contrast_table(fake_runs).splitlines()
    assert contrasts[2].startswith("| original | +4.0 (+4.0 to +4.0) |") and len(contrasts) == 6


@pytest.mark.quick
def test_the_table_of_adjacent_weights(fake_runs):
    """The masks keep the first 4, 5 and 6 of 40 points of every unit, so by unit they have 4 * 3 / (40 * 39)
    of all pairs, and so on."""
    lines = page.adjacent_table(fake_runs).splitlines()
    two = [10_000 * kept / 39 for kept in (3, 4, 5)]
    chance = [10_000 * kept * (kept - 1) / (40 * 39) for kept in (4, 5, 6)]
    more = tables.difference([a - b for a, b in zip(two, chance)], "+.0f")
    cells = f"{tables.mean_sd(chance, '.0f')} | {more} | {' | '.join(2 * [tables.mean_sd(two, '.0f')])}"
    assert f" | {cells} | " in lines[2] and lines[2].endswith("| 86 93 | 72 56 |")
    assert lines[-1].endswith("| 105 | 16 |") and len(lines) == 6


@pytest.mark.quick
def test_every_committed_seed_is_complete():
    """All rounds, and all conditions of the transfer. The page says how many seeds there are."""
    found = tables.read_runs(study.PAGE.parent)
    assert found.keys() == study.CONFIGS.keys(), "run python -m studies.lottery_tickets"
    for name, run in found.items():
        run.require("lottery_tickets", study.CONFIGS[name], mnist1d_gen.sha256(generate()))
        for records in run.records.values():
            rounds = [(r["round"], r["split"]) for r in records if "kept" in r]
            splits = ("train", "test")
            assert rounds == [(number, split) for number in run.config["rounds"] for split in splits]
            assert sum("network" in r for r in records) == 10 * (name == "step-1000")


def test_a_smoke_run_draws_and_tabulates(tmp_path):
    done = run_study("lottery_tickets", "--smoke", "--seeds", 2, "--threads", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"lottery_tickets.png", "masks.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "| own original ticket |" in done.stdout and "| units without input |" in done.stdout


PROGRAM = """
#include <stdlib.h>

static void *copy(const void *data, size_t size) {  // of no byte more than there is
    void *p;
    if (posix_memalign(&p, 64, size ? size : 1)) exit(2);
    return data ? memcpy(p, data, size) : memset(p, 0, size);
}

#define COPY(array) copy(array, sizeof array)

int main(void) {
    layer w[LAYERS] = {LAYER(0), LAYER(1), LAYER(2)};
    row *x = copy(NULL, 4 * (w[0].columns + 1) * sizeof *x);
    row *workspace = copy(NULL, (6 * w[0].rows + 4 + CLASSES) * sizeof *workspace);
    int32_t *labels = copy(NULL, 4 * TILE * sizeof *labels);
    int64_t misses;
    for (int k = 0; k < 4 * TILE; k++) labels[k] = k % (2 * TILE) < TILE + 5 ? k % CLASSES : -1;
    int failed = (int)train(w, x, labels, 2, 2, TILE + 5, 0, 3, 0.01, workspace);
    evaluate(w, x, labels, 4, &misses, workspace);
    for (int l = 0; l < LAYERS; l++) {
        free((void *)w[l].row_start), free((void *)w[l].column), free((void *)w[l].column_start);
        free((void *)w[l].row), free((void *)w[l].place), free(w[l].weight), free(w[l].gradient);
        free(w[l].mean), free(w[l].square);
    }
    free(x), free(workspace), free(labels);
    return failed;
}
"""
LAYER = """#define LAYER(l) {rows##l, columns##l, count##l, column_blocks##l, row_blocks##l, \\
    COPY(row_start##l), COPY(column##l), COPY(column_start##l), COPY(row##l), COPY(place##l), \\
    copy(NULL, 4 * count##l), copy(NULL, 4 * count##l), copy(NULL, 4 * count##l), copy(NULL, 4 * count##l)}
"""


@pytest.mark.parametrize("kept", [0.05, 0.5])  # one block, and several
def test_sanitizers_find_nothing(kept, tmp_path):
    random, lines = np.random.default_rng(0), [f'#include "{sparse_mlp.SOURCE}"', LAYER]
    for number, shape in enumerate(((70, 41), (70, 71), (10, 71))):
        order = sparse_mlp._order(random.random(shape) < kept)
        count = len(order.pop("rows"))
        sizes = {"rows": shape[0], "columns": shape[1] - 1, "count": count}
        sizes["column_blocks"], sizes["row_blocks"] = order.pop("column_blocks"), order.pop("row_blocks")
        order["column"] = order.pop("columns")
        lines += [f"enum {{ {name}{number} = {size} }};" for name, size in sizes.items()]
        for name, values in order.items():
            lines.append(f"static const int32_t {name}{number}[] = {{{', '.join(map(str, values))}}};")
    flag = "-D_POSIX_C_SOURCE=200809L"
    assert_sanitizers_find_nothing(tmp_path, "\n".join([*lines, PROGRAM]), flag)


# The flags


@pytest.mark.quick
def test_without_a_compiler_pytorch_trains(monkeypatch, capsys):
    monkeypatch.setenv("CC", "no-such-compiler")
    assert common.pick_engine("auto", sparse_mlp.load, "a year") == "torch"
    one_sentence(capsys.readouterr().err, "no-such-compiler", "PyTorch", "a year")
    assert common.pick_engine("torch", sparse_mlp.load, "a year") == "torch"
    assert capsys.readouterr().err == ""
    with pytest.raises(utils.BadRequest, match="no-such-compiler"):
        common.pick_engine("c", sparse_mlp.load, "a year")
