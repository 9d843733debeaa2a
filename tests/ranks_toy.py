"""A study of seeds that only wait, for tests/test_ranks.py; `several` runs several scripts in turn.

torchrun --nproc-per-node 3 tests/ranks_toy.py several OUT
"""

import json
import sys
import time
from pathlib import Path

import modern
import repro
import utils
from records import run as runs
from studies import common, more_data


@utils.exit_status
def main(argv=None):
    """Two configs, then two more, which need what the first two have found."""
    parser = common.study_flags("toy", "a study of seeds that only wait")
    parser.add_argument("--pause", type=float, default=0, help="seconds for a tenth of a seed")
    parser.add_argument("--fails", type=int, help="a seed that fails")
    parser.add_argument("--breaks", type=int, help="a seed with a fault in its code")
    parser.add_argument("--differs", action="store_true", help="train another config on each rank")
    parser.add_argument("--late", type=float, default=0, help="seconds by which rank 1 is late")
    args = common.parse(parser, argv)
    time.sleep(args.late if utils.RANK else 0)
    missed = 0

    def train(config, seed, progress):
        for _ in range(10):
            time.sleep(args.pause)
            progress(1)
        if seed == args.fails:
            raise utils.RunFailed(f"seed {seed} diverged")
        if seed == args.breaks:
            raise KeyError("a fault")
        return [runs.evaluation(1, "test", 1 / (seed + 3), (seed + missed + config["number"]) % 99, 99)]

    for first in (0, 2):
        configs = {f"config{number}": {"number": number} for number in (first, first + 1)}
        if args.differs:
            configs[f"config{first}"]["rank"] = utils.RANK
        found = common.run_configs(args, "toy", configs, train, "data", work=lambda config: 10)
        missed = sum(record["misses"] for run in found.values() for record in run.final("test"))
    print("finished", missed)


def train_together(out, seed, seeds):
    """Train change 0 of modern.py with PyTorch, which makes one computation of all seeds."""
    words = "--data", "strokes", "--smoke", "--quiet", "--no-figures", "--engine", "torch", "--change", "0"
    return modern.main([*words, "--seed", f"{seed}", "--seeds", f"{seeds}", "--out", f"{out}"])


def several(out):
    """The exit statuses of several scripts, by name."""
    usual = "--data", "strokes", "--smoke", "--quiet", "--no-figures"
    return {
        "repro": repro.main([*usual, "--seeds", "4", "--out", f"{out}/repro"]),
        "few": repro.main([*usual, "--seeds", "1", "--out", f"{out}/few"]),
        "modern": modern.main([*usual, "--seeds", "2", "--change", "all", "--out", f"{out}/modern"]),
        "torch": train_together(f"{out}/torch", 1337, 4),
        "study": more_data.main(["--smoke", "--quiet", "--seeds", "2", "--out", f"{out}/study"]),
        "again": more_data.main(["--smoke", "--quiet", "--seeds", "2", "--out", f"{out}/study"]),
        "toy": main(["--seeds", "5", "--out", f"{out}/toy"]),
        "differs": main(["--seeds", "5", "--differs", "--out", f"{out}/differs"]),
        "fails": main(["--seeds", "6", "--fails", "1", "--out", f"{out}/fails"]),
    }


if __name__ == "__main__":
    if sys.argv[1] == "several":
        statuses = several(sys.argv[2])
        Path(sys.argv[2], f"statuses{utils.RANK}.json").write_text(json.dumps(statuses))
    else:
        sys.exit(main())
