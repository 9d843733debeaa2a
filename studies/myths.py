"""The seven myths on one page: what each study found, with how many seeds, and in how many minutes.

    python -m studies.myths    # writes the table of results/myths/README.md from the records of the studies

Each study says what would refute its claim, and trains what is missing when it is run by its own name.
"""

import sys

import utils
from records.tables import markdown_table, read_runs, write_tables

PAGE = utils.ROOT / "results" / "myths" / "README.md"
# study -> what is said, and the verdict of its page
MYTHS = {
    "myth1_hessians": ("Hessians are too expensive in frameworks for matrices", "it depends on the route"),
    "myth2_name_that_dataset": ("Data sets are fair samples of the world", "falls"),
    "myth3_fresh_test_sets": ("Test sets that everybody uses are worn out", "falls"),
    "myth4_forgetting": ("Every training example is needed", "it depends on the task"),
    "myth5_fixup": ("Very deep networks need normalisation", "falls, with a rate for each depth"),
    "myth6_attention": ("Attention beats convolution", "falls, and locality is why"),
    "myth6_micro_vit": ("the same, on the digits of 1989", "falls, by a little"),
    "myth7_saliency": ("Saliency maps show what a network looks at", "it depends on the map"),
}


def tables(folder=PAGE.parent):
    """The page's table, from the runs in the folders beside `folder`."""
    rows = []
    for study, (said, verdict) in MYTHS.items():
        found = read_runs(folder.parent / study)
        seeds = sorted({len(run.records) for run in found.values()})
        spread = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else seeds[0]
        seconds = sum(sum(run.seconds()) for run in found.values())
        page = f"[{study.split('_')[0].removeprefix('myth')}](../{study}/README.md)"
        rows.append((page, said, verdict, len(found), spread, f"{seconds / 60:.0f}"))
    head = ("", "what is said", "verdict", "configs", "seeds", "minutes")
    return {"myths": markdown_table(head, rows, left=3)}


@utils.exit_status
def main(argv=None):
    utils.Parser("myths", __doc__).parse_args(argv)
    found = tables()
    print(found["myths"])
    write_tables(PAGE, found)


if __name__ == "__main__":
    sys.exit(main())
