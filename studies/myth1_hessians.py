"""Are Hessians too expensive, because the libraries compute with matrices and not with tensors?

    python -m studies.myth1_hessians    # checks all routes, measures the times, writes the figure and tables

Published (Laue, Mitterreiter and Giesen 2018, as Chang and Lipson 2019 quote them; `hessians` in
reference/myths.toml): a calculus of tensors gives expressions for Hessians that are two orders of magnitude
faster on a CPU than those of the libraries, for x'Ax, logistic regression and matrix factorisation. Here all
routes of PyTorch are held against the closed form, which is what such a calculus would find. It is written by
hand, so this is libraries against a person and not against their tool. A fourth problem is the last layer of
the trained network of 1989, 310 parameters, with its loss on 2,000 digits.

What would confirm the claim for PyTorch today: with 200 parameters, a loop over rows takes at least 30 times
as long as the closed form for all three problems. What would refute it: a route that takes at most 3 times as
long as the closed form for all three; if only for some, it depends. The article concludes that Hessians are
too expensive. What would refute that: the product of a Hessian and a vector, which is all that most methods
need, takes less than 5 times as long as a gradient, for each problem with 800 parameters and for all 9,760
parameters of the network. (These bounds were set after pilots of some minutes.)

The .jsonl files hold how far each route is from the closed form. times.json holds the times and the machine:
seconds that one thread has computed, so that other programs count little; medians of rounds in which all take
their turn, and ratios within a round. They are measured once; `--again` measures them anew.
"""

import functools
import json
import os
import sys
import warnings

import torch
import torch.nn.functional as F
from torch.autograd import functional
from torch.func import grad, hessian, jacfwd, jacrev, jvp

import prepro
import repro
import utils
from records import figures
from records.tables import read_runs
from studies import common, myth1_page
from studies.myth1_page import deviation

PAGE = utils.ROOT / "results" / "myth1_hessians" / "README.md"
RANK, COMPILED, ROUNDS = 5, 200, 7  # the rank of the factorisation; the size to compile for; of the times
CONFIGS = {
    name: {"problem": name, "sizes": [50, 200, 800]}
    for name in ("quadratic", "quadratic-sum", "logistic", "factorisation")
}
CONFIGS["layer"] = {**repro.make_config(), "problem": "layer", "sizes": [310], "digits": 2_000}
SMOKE = {"sizes": [10]}, {"data": "strokes", "passes": 1, "digits": 20}  # of the first four, of the last


# The problems: a function of one vector, its Hessian in closed form, and a point


def quadratic(n, generator, dtype):
    A = torch.randn(n, n, generator=generator).to(dtype)
    return lambda x: x @ A @ x, lambda x: A + A.T, torch.randn(n, generator=generator).to(dtype)


def quadratic_sum(n, generator, dtype):
    """The same function, written in another way."""
    A = torch.randn(n, n, generator=generator).to(dtype)
    return lambda x: (x * (A @ x)).sum(), lambda x: A + A.T, torch.randn(n, generator=generator).to(dtype)


def logistic(n, generator, dtype):
    """The loss of weights (n,) on 2n examples: sum of log(1 + exp(-y x'w))."""
    X = torch.randn(2 * n, n, generator=generator).to(dtype)
    y = torch.randn(2 * n, generator=generator).sign().to(dtype)
    w = torch.randn(n, generator=generator).to(dtype) / n**0.5

    def closed(w):
        s = torch.sigmoid(X @ w)
        return X.T @ ((s * (1 - s))[:, None] * X)

    return lambda w: F.softplus(-y * (X @ w)).sum(), closed, w


def factorisation(n, generator, dtype):
    """|T - UV'|^2 as a function of the n numbers of U, which has five columns."""
    rows = n // RANK
    T, V = (torch.randn(rows, columns, generator=generator).to(dtype) for columns in (rows, RANK))
    u, eye = torch.randn(n, generator=generator).to(dtype), torch.eye(rows, dtype=dtype)
    return lambda u: (T - u.view(rows, RANK) @ V.T).square().sum(), lambda u: torch.kron(eye, 2 * V.T @ V), u


def layer(parameters, images, targets, dtype):
    """The loss of the network of 1989 as a function of its last layer's weights (30, 10) and biases (10)."""
    cut = parameters._replace(outw=torch.eye(30), outb=torch.zeros(30))  # whose outputs are those of H3
    H3 = torch.atanh(repro.forward(cut, images, torch.tanh))
    H3 = F.pad(H3, (0, 1), value=1.0).to(dtype)  # a bias is the weight of one more input
    targets = targets.to(dtype)

    def closed(w):
        y = torch.tanh(H3 @ w.view(31, 10))
        slope = 1 - y.square()
        curvature = 2 * slope * (slope - 2 * y * (y - targets)) / y.numel()  # of the loss, along each output
        H = torch.zeros(31, 10, 31, 10, dtype=dtype)
        H.diagonal(dim1=1, dim2=3).copy_(torch.einsum("na,nj,nb->abj", H3, curvature, H3))
        return H.view(310, 310)

    w = torch.cat([parameters.outw, parameters.outb[None]]).flatten().to(dtype)
    return lambda w: (torch.tanh(H3 @ w.view(31, 10)) - targets).square().mean(), closed, w


def network(parameters, images, targets, dtype):
    """The same loss as a function of all 9,760 parameters. Its Hessian is not computed."""
    sizes = [parameter.numel() for parameter in parameters]
    images, targets = images.to(dtype), targets.to(dtype)

    def value(w):
        own = (part.view(p.shape) for part, p in zip(w.split(sizes), parameters))
        return (repro.forward(repro.Parameters(*own), images, torch.tanh) - targets).square().mean()

    return value, None, torch.cat([parameter.flatten() for parameter in parameters]).to(dtype)


PROBLEMS = dict(zip(CONFIGS, (quadratic, quadratic_sum, logistic, factorisation, layer)))


def make_problem(name, n, seed, dtype, digits):
    """The function, its Hessian and a point; `digits` are (parameters, images, targets) of a network."""
    if name in ("layer", "network"):
        return (layer if name == "layer" else network)(*digits, dtype)
    return PROBLEMS[name](n, torch.Generator().manual_seed(seed), dtype)


# The routes: f and x (n,) to the Hessian (n, n), or with v to its product with v


def loop_over_rows(f, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    rows = (torch.autograd.grad(gradient[i], x, retain_graph=True)[0] for i in range(len(x)))
    return torch.stack(list(rows))


def rows_in_one_batch(f, x):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, torch.eye(len(x), dtype=x.dtype), is_grads_batched=True)[0]


def backward_twice(f, x, v):
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(gradient, x, v)[0]


ROUTES = {
    "loop over rows": loop_over_rows,
    "autograd.grad, is_grads_batched": rows_in_one_batch,
    "functional.hessian": functional.hessian,
    "functional.hessian, vectorize": functools.partial(functional.hessian, vectorize=True),
    "functional.hessian, forward-mode": functools.partial(
        functional.hessian, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "func.hessian = jacfwd(jacrev)": lambda f, x: hessian(f)(x),
    "jacrev(jacrev)": lambda f, x: jacrev(jacrev(f))(x),
    "jacrev(jacfwd)": lambda f, x: jacrev(jacfwd(f))(x),
    "jacfwd(jacfwd)": lambda f, x: jacfwd(jacfwd(f))(x),
}
PRODUCTS = {
    "backward twice": backward_twice,
    "functional.vhp": lambda f, x, v: functional.vhp(f, x, v)[1],
    "functional.hvp": lambda f, x, v: functional.hvp(f, x, v)[1],
    "jvp of grad": lambda f, x, v: jvp(grad(f), (x,), (v,))[1],
}
# PyTorch's rule for a batch of products of two vectors fails if only one of the vectors is in the batch.
FAILS = {("quadratic", "functional.hessian, forward-mode")}
# Forward within another derivative keeps n^2 copies of the examples: 8 GB for 800 parameters.
LARGEST = {"jacrev(jacfwd)": 200, "jacfwd(jacfwd)": 200}


def routes_of(name, n):
    return {
        route: compute
        for route, compute in ROUTES.items()
        if (name, route) not in FAILS and n <= LARGEST.get(route, n)
    }


# The checks, and the times


def digits_of(config, seed, splits, engine):
    """A trained network's parameters, and the first of its training digits with their targets, as tensors."""
    _, parameters = repro.train(config, seed, splits, repro.pick_engine(engine, "cpu", config))
    images, labels = (array[: config["digits"]] for array in splits["train"])
    parameters = repro.Parameters(*map(torch.from_numpy, parameters))
    return parameters, *map(torch.from_numpy, (images, repro.place_code(labels)))


def train(config, seed, progress, splits, engine):
    """The records of a problem: the deviation of each route from the closed form, relative to its maximum."""
    name, records = config["problem"], []
    digits = digits_of(config, seed, splits, engine) if name == "layer" else None
    for n in config["sizes"]:
        exact = make_problem(name, n, seed, torch.float64, digits)
        H = exact[1](exact[2])
        v = torch.randn(n, generator=torch.Generator().manual_seed(seed)).double()
        for route, compute in routes_of(name, n).items():
            progress(0)
            own = {"float64": deviation(compute(exact[0], exact[2]), H)}
            f, _, x = make_problem(name, n, seed, torch.float32, digits)
            own["float32"] = deviation(compute(f, x), H)
            records.append({"n": n, "route": route} | own)
        for route, compute in PRODUCTS.items():
            own = {"float64": deviation(compute(exact[0], exact[2], v), H @ v)}
            records.append({"n": n, "product": route} | own)
    if name == "layer":
        curvatures = torch.linalg.eigvalsh(H)
        ends = {"lowest": curvatures[0].item(), "highest": curvatures[-1].item()}
        records.append({"n": n, **ends, "negative": int((curvatures < -1e-12 * ends["highest"]).sum())})
    return records


def contenders(configs, digits):
    """(problem, n, name) -> a function to be timed: in float32, with the data of seed 0."""
    found, own = {}, [(name, n) for name, config in configs.items() for n in config["sizes"]]
    for name, n in [*own, ("network", 9_760)]:
        f, closed, x = make_problem(name, n, 0, torch.float32, digits)
        found[name, n, "gradient"] = functools.partial(myth1_page.gradient, f, x)
        for product, compute in PRODUCTS.items():
            found[name, n, product] = functools.partial(compute, f, x, torch.ones_like(x))
        if closed:
            found[name, n, "closed form"] = functools.partial(closed, x)
            for route, compute in routes_of(name, n).items():
                found[name, n, route] = functools.partial(compute, f, x)
        if n == COMPILED and (fast := myth1_page.compiled(f, x, closed(x))):
            found[name, n, "func.hessian, compiled"] = functools.partial(fast, x)
    return found


def tables(folder=PAGE.parent):
    """The page's tables by the names of their markers, from what is in a folder."""
    return myth1_page.tables_of(read_runs(folder), json.loads((folder / "times.json").read_text()))


@utils.exit_status
def main(argv=None):
    parser = common.study_flags("myth1_hessians", __doc__, seeds=3, without=("device", "threads"))
    args = common.parse(parser, argv)
    args.threads = 1  # what is timed runs alone, and forward-mode differentiation is not made for threads
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)  # PyTorch's own
    small = {name: SMOKE[name == "layer"] if args.smoke else {} for name in CONFIGS}
    configs = {name: config | small[name] for name, config in CONFIGS.items()}
    digits = prepro.load(configs["layer"]["data"], data_root=args.data_root)
    splits = repro.border_splits(digits, 100 if args.smoke else None)
    do = functools.partial(train, splits=splits, engine=args.engine)
    trained = repro.engine_facts(repro.pick_engine(args.engine, "cpu", configs["layer"]))["engine"]
    for name, config in configs.items():
        sha256, engine = (digits.sha256(), trained) if name == "layer" else ("", "torch")
        common.run_configs(args, "myth1_hessians", {name: config}, do, sha256, engine=engine)
    if args.again or not (args.out / "times.json").exists():
        rounds, seconds = (1, 1e-4) if args.smoke else (ROUNDS, 0.02)
        entered = contenders(configs, digits_of(configs["layer"], 0, splits, args.engine))
        record = {"rounds": rounds, "load": os.getloadavg()}
        own = myth1_page.measure(entered, rounds, seconds, args.quiet)
        record["microseconds"] = [[*key, microseconds] for key, microseconds in own.items()]
        utils.write_file(args.out / "times.json", json.dumps(record | utils.environment(), indent=1) + "\n")
    record = json.loads((args.out / "times.json").read_text())
    figures.save(myth1_page.plot(record), args.out / "myth1_hessians.png")
    common.show(args, PAGE, tables(args.out))


if __name__ == "__main__":
    sys.exit(main())
