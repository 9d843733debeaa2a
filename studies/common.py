"""What the studies share: their flags, and training all configs and seeds that are not on disk yet."""

import contextlib
import time

import prepro
import utils
from records import run as runs


def study_flags(name, doc, seed=0, seeds=5):
    """The flags of the study `name`, ready for flags of its own."""
    parser = utils.Parser(name, doc)
    flag = parser.add_argument_group("data").add_argument
    flag("--data-root", metavar="DIR", type=utils.folder, help=prepro.DATA_ROOT_HELP)
    utils.add_run_flags(parser, utils.ROOT / "results" / name, seed, seeds)
    parser.add_argument("--again", action="store_true", help="train what is on disk already anew")
    return parser


def parse(parser, argv=None):
    """The flags; `--smoke` runs go to results/smoke/, so that no page ever shows one."""
    args = parser.parse_args(argv)
    if args.smoke and args.out == parser.get_default("out"):
        args.out = utils.ROOT / "results" / "smoke" / args.out.name
    return args


def run_configs(args, study, configs, train, data_sha256="", work=None, together=False, **facts):
    """Train every config (name -> dict) on every seed, `args.threads` at a time: name -> Run, of all on disk.

    `train(config, seed, progress)` returns the records of a seed; with `together`, `train(config, seeds,
    progress)` returns seed -> records for a whole list of seeds, which then are one job. Seeds that are in
    `<args.out>/<name>.jsonl` are skipped unless `args.again`. `work(config)`: how many steps of the progress
    bar a seed is, which `train` reports by `progress(n)`; without it, the bar counts seeds.
    """
    seeds, opened = range(args.seed, args.seed + args.seeds), {}
    with contextlib.ExitStack() as stack:
        jobs = []
        for name, config in configs.items():
            path = args.out / f"{name}.jsonl"
            done = {} if args.again or not path.exists() else runs.read_run(path).records
            missing = [seed for seed in seeds if seed not in done]
            if missing:
                facts = {"threads": args.threads, **facts}
                run = stack.enter_context(runs.open_run(path, study, config, data_sha256, **facts))
            else:
                run = runs.read_run(path)
                run.require(study, config, data_sha256)
            opened[name] = run
            jobs += [(run, missing)] * bool(missing) if together else [(run, [seed]) for seed in missing]

        def job(job, progress):
            run, own = job
            started = time.perf_counter()
            if together:
                results = train(run.config, own, progress)
            else:
                results = {own[0]: train(run.config, own[0], progress)}
            run.add(results, time.perf_counter() - started)
            if not work:
                progress(len(own))

        count = work or (lambda config: 1)
        total = sum(count(run.config) * len(own) for run, own in jobs)
        if jobs:
            runs.in_parallel(job, jobs, args.threads, total, args.quiet, "step" if work else "seed")
    return opened
