"""Flags that mean the same in every script."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

from common import log
from common.settings import (  # noqa: F401  scripts write flags.resolve, flags.mathematics
    HOW_TO_RUN,
    add_settings,
    follow,
    mathematics,
    per_stage,
    resolve,
)
from common.splits import UserError, make_split, read_split, split_of


class Parser(argparse.ArgumentParser):
    """Bad flags end in one line, like every other bad input, not in a page of usage."""

    def error(self, message):
        print(f"error: {message}; see python {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


def add_data(parser, datasets, labels_help: str, path_help=None, number_help=None):
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=datasets, help="default: digits, or folder with --data-path [README]")
    add("--data-path", metavar="DIR", help=path_help or "train/<class>/ and val/<class>/; "
        "or labeled/<class>/, unlabeled/ and perhaps val/; or what torchvision expects [README]")
    add("--labels", type=float, metavar="PERCENT", help=labels_help)
    add("--num-labels", type=int, metavar="N", help=number_help or "labelled images in all, "
        "equally many per class; instead of --labels [README]")
    add("--labels-file", nargs="+", metavar="LIST", help="published list of the labelled images, "
        "and perhaps one of the unlabelled [README]")
    add("--split-seed", type=int, default=0, help="draw of the labelled images [README]")
    add("--unlabeled-pool", choices=("rest", "all"), help="whether labelled images are in the "
        "unlabelled stream too; default: the recipe's [departures]")
    add("--holdout", type=int, default=0, metavar="N", help="validate on N training images, which "
        "leave training: for choosing settings [README]")
    add("--image-size", type=int, help="pixels; default by data set [table DATASETS]")


def add_running(parser, script: str):
    add = parser.add_argument_group("how to run; never what is computed").add_argument
    add("--accum-steps", type=int, default=1, help="the same batch in so many parts; what is drawn "
        "or counted per part is said in the step's docstring [README]")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 [README]")
    add("--dtype", choices=("auto", "bf16", "fp16", "fp32"), default="auto",
        help="auto: bf16 where native, else fp16 with a scaler; fp32 on a CPU [README]")
    add("--compile", action="store_true", help="torch.compile, in place [README]")
    add("--workers", type=int, help="loading processes per process; default 0 for the digits, else "
        "up to 8 [README]")
    add("--seed", type=int, default=0, help="of weights, order, views and mixing [README]")
    add("--deterministic", action="store_true", help="deterministic kernels on a GPU too [README]")
    add("--max-bad-images", type=int, default=0, metavar="N",
        help="let N unreadable pictures pass, in each process [README]")
    add = parser.add_argument_group("a run and its life").add_argument
    add("--output", metavar="DIR",
        help=f"new folder; default the next free runs/{script}-NNN [README]")
    add("--resume", metavar="RUN",
        help="auto, or a run's folder: go on exactly where it stopped [README]")
    add("--save-every", type=int, default=500, metavar="N",
        help="updates between checkpoints [README]")
    add("--print-every", type=int, default=50, metavar="N",
        help="updates between log lines [README]")
    add("--evals", type=int, default=10, metavar="N",
        help="evaluations per stage, the last at its end [README]")
    add("--stop-after", type=int, metavar="N",
        help="save and end after update N of a stage, as a signal would; the last update of a "
        "stage does not end the run [README]")
    add("--eval", metavar="RUN", help="train nothing: evaluate a run's final weights [README]")
    add("--predict", metavar="PATH",
        help="picture or folder to predict at the end, or with --eval RUN at once [README]")
    add("--dry-run", action="store_true",
        help="print the run and the paper's row, with cost; needs no data [README]")


def check(parser: argparse.ArgumentParser, args):
    """What argparse itself cannot see; ends with one line and exit code 2."""
    if sum(x is not None for x in (args.num_labels, args.labels, args.labels_file)) > 1:
        parser.error("--labels, --num-labels and --labels-file exclude each other; keep one")
    if args.labels is not None and not 0 < args.labels <= 100:
        parser.error(f"--labels {args.labels:g}: a percentage above 0, up to 100")
    if args.labels_file and len(args.labels_file) > 2:
        parser.error("--labels-file: one list of labelled images, and perhaps one of unlabelled "
                     "ones")
    for name in ("accum_steps", "print_every", "save_every", "evals"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    for name in ("workers", "seed", "split_seed", "holdout", "max_bad_images"):
        if (getattr(args, name) or 0) < 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 0")
    for name in ("num_labels", "image_size", "patch_size", "heads", "stop_after"):
        if (getattr(args, name, None) or 1) < 1 or getattr(args, name, None) == 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")


def choose_split(args, data, pool: str, percent: float):
    """The split that the flags, or the layout of the data, ask for; percent: --labels' default."""
    train = data.train
    ids = [i.decode("utf-8", "surrogateescape") for i in train.ids]
    if args.labels_file:
        return read_split(ids, train.targets, data.classes, *args.labels_file, pool=pool,
                          root=train.root)
    if data.labeled is not None and args.labels is None and args.num_labels is None:
        name = "labeled/ and unlabeled/"
        return split_of(name, ids, train.targets, data.classes, data.labeled, None, pool)
    return make_split(ids, train.targets, data.classes, number=args.num_labels,
                      seed=args.split_seed,
                      percent=None if args.num_labels else args.labels or percent, pool=pool)


def stored_args(args, script: str):
    """The flags of the run that --eval names, with today's flags for how and where to run."""
    stored = log.read_log(Path(args.eval))[0]
    if stored.get("script") != script:
        raise UserError(f"--eval {args.eval}: a run of {stored.get('script')}.py, "
                        f"not of {script}.py")
    now = {k: v for k, v in vars(args).items() if k in HOW_TO_RUN and (k != "data_path" or v)}
    return SimpleNamespace(**{**vars(args), **stored["args"], **now})  # a flag may be newer


