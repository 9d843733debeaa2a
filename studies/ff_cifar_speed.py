"""How fast are products with local receptive fields, and the steps of studies/ff_cifar.py?

    python -m studies.ff_cifar_speed             # half a minute of one core; prints the tables
    python -m studies.ff_cifar_speed --record    # keeps the measurement in results/ff_cifar/speed.json, too

All contenders take turns in one process, and times are medians of the turns, in seconds that the thread has
computed. A layer with local fields could be multiplied as one dense matrix that is mostly zeros; as 1,024
matrices, one a place; or by tiles of places that share most of what they see. On another machine, only the
ratios mean something.
"""

import json
import statistics
import sys
import time

import torch

import forward_forward as ff
import utils
from kernels import build
from kernels.local_fields import FieldKernels, TorchFields, to_tiles
from records.tables import write_tables
from studies import ff_cifar, ff_cifar_page

EXAMPLES = 200  # a batch of studies/ff_cifar.py


def contenders(dtype, x, d, fields):
    """name -> functions (forward, gradient by weights), for x, d (n, 3072) and weights (1024, 363, 3)."""

    def own(engine, weights):
        seen = engine.see(x)
        return lambda: engine.products(engine.see(x), weights), lambda: engine.outer(seen, d)

    dense = torch.zeros(ff_cifar.UNITS, ff_cifar.UNITS, dtype=dtype)
    found = {"one dense matrix": (lambda: x @ dense, lambda: x.T @ d)}
    for tile in (1, 4, 8, 16):
        name = f"tiles of {tile}x{tile}, PyTorch" if tile > 1 else "a matrix a place"
        found[name] = own(TorchFields(tile=tile), to_tiles(fields, tile))
    try:
        found["tiles of 4x4, C"] = own(FieldKernels(dtype), to_tiles(fields))
    except build.Unavailable as error:
        print(f"no C: {error}", file=sys.stderr)
    return found


def steps(engine, fields, x, labels):
    """config -> a function that does one step of training, or of answering."""
    found, chance = {}, torch.rand(len(x), generator=torch.Generator().manual_seed(0))
    for name, config in ff_cifar.CONFIGS.items():
        network = ff_cifar.Network(config, 0, engine, fields)
        step, answers = ff_cifar.STEPS[config["method"]]
        found[name] = (
            lambda step=step, network=network: step(network, x, labels, chance, 1e-6),
            lambda answers=answers, network=network: answers(network, x),
        )
    return found


def measure(pairs, rounds):
    """name -> the medians of the seconds that both functions of a pair take."""
    taken = {name: ([], []) for name in pairs}
    for turn in range(rounds + 1):
        for name, pair in pairs.items():
            for function, own in zip(pair, taken[name]):
                started = time.thread_time()
                function()
                if turn:  # the first turn warms up
                    own.append(time.thread_time() - started)
    return {name: [statistics.median(own) for own in pair] for name, pair in taken.items()}


@utils.exit_status
def main(argv=None):
    parser = utils.Parser("ff_cifar_speed", __doc__)
    path = ff_cifar.PAGE.parent / "speed.json"
    parser.add_argument("--record", action="store_true", help=f"write {path.relative_to(utils.ROOT)}")
    words = "turns of each contender (default: 7)"
    parser.add_argument("--rounds", type=utils.number(int, 1, 1000), default=7, help=words)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ff_cifar.keep_freed_memory()
    found = {"examples": EXAMPLES, "rounds": args.rounds, **utils.environment(), "products": {}}
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(EXAMPLES, ff_cifar.UNITS, generator=generator) for _ in range(2))
    weights = torch.randn(ff_cifar.PLACES, ff_cifar.FAN_IN, ff_cifar.MAPS, generator=generator)
    with torch.inference_mode():
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            tensors = (tensor.to(dtype) for tensor in (x, d, weights))
            found["products"][precision] = measure(contenders(dtype, *tensors), args.rounds)
        engine, name = ff.pick_engine("auto", "cpu", "fp32")
        fields = FieldKernels(engine.dtype) if name == "c" else TorchFields()
        labels = torch.arange(EXAMPLES) % ff.LABELS
        found["engine"] = name
        found["steps"] = measure(steps(engine, fields, ff.unit_rms(x).to(engine.dtype), labels), args.rounds)
    if args.record:
        utils.write_file(path, json.dumps(found, indent=1) + "\n")
        write_tables(ff_cifar.PAGE, ff_cifar_page.tables(ff_cifar.PAGE.parent))
    print(ff_cifar_page.products_table(found), ff_cifar_page.steps_table(found), sep="\n\n")


if __name__ == "__main__":
    sys.exit(main())
