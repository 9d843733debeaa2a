"""studies/myth6_attention.py and the layers that it shares with the micro-ViT, against PyTorch's own."""

import functools
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mnist1d_gen
import utils
from records import tables
from studies import mixers, mnist1d, myth6_attention, myth6_page
from studies import myth6_common as myth6

KINDS = myth6_attention.KINDS
SMALL = {"train_size": 200, "test_size": 100, "fresh_size": 100, "updates": 5, "batch_size": 48}


def in_double(config, seeds):
    parameters = mnist1d.init_parameters(myth6_attention.shapes(config), seeds)
    return {name: p.detach().double().requires_grad_() for name, p in parameters.items()}


def plain_mixer(kind, config, p, name, h):
    """h (n, positions, channels) with its positions mixed, by PyTorch's own layers."""

    def linear(name, h):
        return F.linear(h, p[f"{name}_weight"], p[f"{name}_bias"].flatten())

    width, heads, (n, positions, d) = config["kernel_width"], config["heads"], h.shape
    if kind == "conv":
        kernel = p[f"{name}conv_weight"].unflatten(1, (width, d)).mT  # it is (outputs, taps, inputs)
        bias = p[f"{name}conv_bias"].flatten()
        mixed = F.conv1d(h.mT, kernel, bias, padding=width // 2).mT
    elif kind in ("depthwise", "light"):
        kernel = p[f"{name}kernel"].unflatten(0, (-1, width)).mT
        if kind == "light":
            kernel = kernel.softmax(2).repeat_interleave(d // heads, 0)
        mixed = F.conv1d(F.glu(linear(f"{name}glu", h)).mT, kernel, padding=width // 2, groups=d).mT
    elif kind == "dynamic":
        values = F.glu(linear(f"{name}glu", h)).unflatten(2, (heads, -1))
        kernels = linear(f"{name}kernel", h).unflatten(2, (heads, width)).softmax(3)
        mixed = torch.zeros_like(values)
        for i, k in itertools.product(range(positions), range(width)):
            if 0 <= (j := i + k - width // 2) < positions:
                mixed[:, i] += kernels[:, i, :, k, None] * values[:, j]
        mixed = mixed.flatten(2)
    else:
        mask = None
        if kind in ("relative", "window"):
            mask = h.new_empty(heads, positions, positions)  # of queries, then keys
            for query, key in itertools.product(range(positions), repeat=2):
                mask[:, query, key] = p[f"{name}bias"][:, key - query + positions - 1]
                if kind == "window" and abs(key - query) > width // 2:
                    mask[:, query, key] = -math.inf
            mask = mask.repeat(n, 1, 1)
        own = (p[f"{name}{part}"] for part in ("qkv_weight", "qkv_bias", "mix_weight", "mix_bias"))
        into, into_bias, out, out_bias = (each.flatten() if each.shape[1] == 1 else each for each in own)
        given = [h.transpose(0, 1)] * 3, d, heads, into, into_bias, None, None, False, 0.0, out, out_bias
        found = F.multi_head_attention_forward(*given[0], *given[1:], attn_mask=mask, need_weights=False)
        return found[0].transpose(0, 1)
    return linear(f"{name}mix", mixed)


def plain_network(config, p, x):
    """Logits (n, 10) of signals (n, 40) by one replica's parameters."""
    width, norm = (
        config["embedding_width"],
        functools.partial(F.layer_norm, normalized_shape=(config["channels"],)),
    )
    h = F.conv1d(x[:, None], p["embed_weight"][:, None], p["embed_bias"].flatten(), padding=width // 2).mT
    h = h + p["positions"].T
    for number in range(config["blocks"]):
        name = f"block{number}_"
        h = h + plain_mixer(config["mixer"], config, p, name, norm(h))
        up = F.linear(norm(h), p[f"{name}up_weight"], p[f"{name}up_bias"].flatten()).relu()
        h = h + F.linear(up, p[f"{name}down_weight"], p[f"{name}down_bias"].flatten())
    return F.linear(norm(h).mean(1), p["out_weight"], p["out_bias"].flatten())


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_plain_pytorch(kind):
    """In double precision, three replicas, of which each must read its own parameters."""
    config = myth6_attention.make_config(kind)
    parameters = in_double(config, [5, 6, 7])
    x = torch.from_numpy(mnist1d_gen.make_dataset(num_samples=10)["x"][:6])
    y = torch.arange(6)
    logits = myth6_attention.forward(config, parameters, x.T.expand(3, 40, 6))
    mnist1d.cross_entropy(logits, y).sum().backward()
    for replica in 0, 2:
        own = {name: p[replica].detach().clone().requires_grad_() for name, p in parameters.items()}
        expected = plain_network(config, own, x)
        torch.testing.assert_close(logits[replica].T, expected, rtol=0, atol=1e-12)
        F.cross_entropy(expected, y).backward()
        for name, p in own.items():
            torch.testing.assert_close(parameters[name].grad[replica], p.grad, rtol=0, atol=1e-12, msg=name)
            assert p.grad.abs().max() > 1e-6 or name.endswith("qkv_bias"), name


@pytest.mark.quick
def test_derivatives_by_hand_are_those_of_finite_differences():
    torch.manual_seed(0)

    def sample(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    queries, keys, values, bias = (
        sample(2, 6, 3, 5),
        sample(2, 6, 3, 5),
        sample(2, 6, 3, 5),
        sample(2, 2, 5, 5),
    )
    assert torch.autograd.gradcheck(mixers.Attention.apply, (queries, keys, values, bias))
    assert torch.autograd.gradcheck(lambda *all: mixers.Attention.apply(*all, None), (queries, keys, values))
    for places in ((1, 1), (6, 3)):  # kernels that are the same everywhere, and kernels of their own
        assert torch.autograd.gradcheck(
            mixers.WeightedWindows.apply, (sample(2, 2, 3, *places), sample(2, 2, 2, 6, 3))
        )


@pytest.mark.quick
def test_scores_of_any_size():
    """The greatest is subtracted before the exponential: without it, 1,000 is infinite."""
    one = torch.ones(1, 1, 1, 2)
    queries, keys, values = one * 1000, torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 4.0]]]])
    assert mixers.Attention.apply(queries, keys, values, None).tolist() == [[[[4.0, 4.0]]]]


@pytest.mark.quick
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_how_far_a_mixer_sees(kind):
    config = myth6_attention.make_config(kind)
    parameters = in_double(config, [0])
    h = torch.randn(1, 16, 40, 2, dtype=torch.float64, requires_grad=True)
    mixers.mix(parameters, "block0_", h, config)[0, :, 20, 0].sum().backward()
    seen = h.grad[0, :, :, 0].abs().amax(0).nonzero().flatten().tolist()
    assert seen == (list(range(40)) if kind in ("attention", "relative") else list(range(17, 24)))
    assert not h.grad[0, :, :, 1].any(), "an example sees another"


@pytest.mark.quick
def test_all_networks_are_of_one_size():
    counts = {
        kind: mnist1d.count(myth6_attention.shapes(myth6_attention.make_config(kind))) for kind in KINDS
    }
    assert counts["attention"] == 7_274
    assert all(abs(count - 7_274) <= 33 for count in counts.values()), counts


# Data and training


@pytest.mark.quick
def test_the_data():
    """4,000 examples are the published ones; shuffling is published, too; the last 800 are for validation."""
    published = mnist1d_gen.make_dataset()
    ordered, digest = myth6_attention.load_data(myth6_attention.make_config("conv"))
    shuffled, same = myth6_attention.load_data(myth6_attention.make_config("conv", order_seed=42))
    order = np.random.RandomState(42).permutation(40)
    for split, name in (("train", "x"), ("test", "x_test")):
        assert torch.equal(ordered[split][0], torch.tensor(published[name].T, dtype=torch.float32))
        assert torch.equal(shuffled[split][0], ordered[split][0][order])
        assert torch.equal(shuffled[split][1], ordered[split][1])
    assert digest == same and len(ordered["fresh"][1]) == 10_000
    choosing, _ = myth6_attention.load_data(myth6_attention.CHOICES["choose-conv"])
    assert choosing.keys() == {"train", "validation"}
    assert torch.equal(torch.cat([choosing[split][0] for split in choosing], 1), ordered["train"][0])
    assert len(choosing["validation"][1]) == 800


def plain_loop(config, seed):
    """The loss on each split after training in double precision, one replica in the usual layout."""
    parameters = mnist1d.init_parameters(myth6_attention.shapes(config), [seed])
    own = {name: p[0].detach().double().requires_grad_() for name, p in parameters.items()}
    splits, _ = myth6_attention.load_data(config)
    (x, y), batches, lrs = splits["train"], np.random.default_rng(0), []
    optimizer = torch.optim.AdamW(own.values(), weight_decay=config["weight_decay"])
    order = np.concatenate([batches.permutation(200)[:192] for _ in range(2)])  # 8 of 200 do not fill a batch
    for step in range(5):
        batch = torch.from_numpy(order[48 * step : 48 * step + 48])
        lrs.append(
            config["lr"]
            * min((step + 1) / 5 / config["warmup"], (1 + math.cos(math.pi * (step + 1) / 5)) / 2)
        )
        optimizer.param_groups[0]["lr"] = lrs[-1]
        optimizer.zero_grad()
        F.cross_entropy(plain_network(config, own, x.T[batch].double()), y[batch]).backward()
        optimizer.step()
    assert lrs[-1] == 0 and max(lrs) == lrs[0]
    return {
        split: F.cross_entropy(plain_network(config, own, x.T.double()), y).item()
        for split, (x, y) in splits.items()
    }


@pytest.mark.parametrize("kind", ["dynamic", "window"])
def test_training_is_the_plain_loop(kind):
    """In single precision against double: losses differ by 2e-6 of themselves at most, measured."""
    config = myth6_attention.make_config(kind) | SMALL | {"weight_decay": 0.5}
    found = myth6_attention.train(config, [8, 9], lambda n: None)
    for seed, records in found.items():
        expected = plain_loop(config, seed)
        assert {record["split"]: record["loss"] for record in records} == pytest.approx(expected, rel=2e-5)
    alone = myth6_attention.train(config, [9], lambda n: None)[9]
    assert [r["loss"] for r in alone] == pytest.approx([r["loss"] for r in found[9]], rel=1e-5)
    assert abs(found[8][-1]["loss"] - found[9][-1]["loss"]) > 1e-3


@pytest.mark.quick
def test_the_choice(tmp_path):
    """The best is at the end of the list, so one rate beyond it is tried; the records say which was best."""
    best = {1e-3: 7, 3e-3: 5, 1e-2: 9}

    def train(config, seeds):
        own = [{"split": "train", "misses": 1}, {"split": "validation", "misses": best[config["lr"]]}]
        return {seed: own for seed in seeds}

    config = {"lr": [3e-3, 1e-2], "lr_farther": 1}
    records = myth6.choose(config, [100, 101], train, ("lr",))
    assert [record["lr"] for record in records[101][::2]] == [3e-3, 1e-2, 1e-3]
    assert [record["misses"] for record in records[100]] == [1, 5, 1, 9, 1, 7]
    lines = [{"script": "s", "config": {}, "data_sha256": "", "seeds": [100, 101], "records": 12}]
    for seed, own in records.items():
        lines += [{"seed": seed, **record, "n": 800, "error": record["misses"] / 8} for record in own]
    (tmp_path / "choose-a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert myth6.validation_misses(tmp_path, "a", ("lr",)) == {(3e-3,): 10, (1e-2,): 18, (1e-3,): 14}
    assert myth6.best_values(tmp_path, ["a"], ("lr",)) == {"a": {"lr": 3e-3}}


# The page and the program


@pytest.mark.quick
def test_how_much_of_a_gap_is_closed():
    assert myth6_page.share([75, 77], [60, 60], [90, 90]) == "53%"
    assert myth6_page.share([50], [60], [90]) == "-33%" and myth6_page.share([1], [2], [2]) == "-"


@pytest.mark.quick
def test_the_committed_runs_are_complete():
    found, folder = tables.read_runs(myth6_attention.PAGE.parent), myth6_attention.PAGE.parent
    configs = myth6_attention.CONFIGS | myth6_attention.CHOICES
    assert found.keys() == configs.keys(), "run python -m studies.myth6_attention"
    for name, run in found.items():
        seeds = list(myth6.CHOOSING_SEEDS) if name.startswith("choose") else list(range(5))
        assert sorted(run.records) == seeds
        for split, n in ("train", run.config["train_size"]), ("fresh", 10_000), ("test", 1_000):
            assert name.startswith("choose") or [r["n"] for r in run.final(split)] == 5 * [n]
    chosen = myth6.best_values(folder, myth6_attention.CHOSEN, myth6_attention.KEYS)
    assert chosen == myth6_attention.CHOSEN


@pytest.mark.filterwarnings("error")
def test_a_smoke_run_and_the_same_command_again(tmp_path, capsys):
    flags = ["--smoke", "--seeds", "2", "--quiet", "--threads", "1", "--out", str(tmp_path / "out")]
    assert myth6_attention.main(flags) == 0
    first = capsys.readouterr()
    assert first.err == ""
    configs = myth6_attention.CONFIGS | myth6_attention.CHOICES
    names = {f"{name}{ending}" for name in configs for ending in (".jsonl", ".run.json")}
    written = {path.name for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert written == {*names, "myth6_attention.png"}
    found = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    assert myth6_attention.main(flags) == 0
    assert capsys.readouterr().out == first.out
    assert {path: path.read_bytes() for path in found} == found


@pytest.mark.quick
def test_the_published_claim_is_answered_here():
    row = utils.reference("myths")["dynamic-convolutions"]
    assert row["page"] == "results/myth6_attention/README.md"
