"""Flags that mean the same in every script; settings that a recipe, a departure or a flag decides.

A script lists its settings as SETTINGS = {name: (type, {stage: default}, help with [source])}; each
is a flag that takes `10` for every stage or `sup=10,semi=5` for the named ones.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from common import log
from common.splits import UserError, make_split, read_split, split_of

# Never part of what is computed: these may change when a run goes on.
HOW_TO_RUN = set(
    "device dtype compile workers deterministic output resume save_every print_every max_bad_images"
    " predict eval dry_run data_path stop_after accum_steps".split()
)


def per_stage(kind, stages):
    """Type of a flag: text -> {stage: value}."""

    def parse(text):
        if "=" not in text:
            return dict.fromkeys(stages, kind(text))
        given = dict(part.split("=", 1) for part in text.split(","))
        if not given.keys() <= set(stages):
            raise ValueError(text)
        return {stage: kind(value) for stage, value in given.items()}

    parse.__name__ = f"{kind.__name__} (or {','.join(f'{s}=X' for s in stages)})"
    return parse


def add_settings(parser, settings: dict, stages):
    group = parser.add_argument_group(
        "recipe: defaults depend on the row of RECIPES (--dry-run shows it); X, or stage=X,stage=X"
    )
    for name, (kind, _, text) in settings.items():
        flag = "--" + name.replace("_", "-")
        group.add_argument(flag, type=per_stage(kind, stages), metavar="X", help=text)


def add_data(parser, datasets, labels_help: str):
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=datasets, help="default: digits, or folder with --data-path [README]")
    add("--data-path", metavar="DIR", help="train/<class>/ and val/<class>/; or labeled/<class>/, "
        "unlabeled/ and perhaps val/; or what torchvision expects [README]")
    add("--labels", type=float, metavar="PERCENT", help=labels_help)
    add("--num-labels", type=int, metavar="N", help="labelled images in all, equally many per "
        "class; instead of --labels [README]")
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
        help="let N unreadable pictures pass [README]")
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
        help="save and end after update N of a stage, as a signal would [README]")
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
    if (args.workers or 0) < 0:
        parser.error(f"--workers {args.workers}: at least 0")


def resolve(settings: dict, stage: str, layers: list, departures: dict, facts: dict, args):
    """The settings of a stage as a namespace, with `sources`: where each value comes from.

    default < layers, a list of (source, {name: value}) in rising order < --follow < flag. facts:
    {dataset, arch, init, labels, stage}, against which a departure's `where` is matched.
    """
    s = SimpleNamespace(**{name: default[stage] for name, (_, default, _) in settings.items()})
    s.sources = {n: "default [" + text.rsplit("[", 1)[1].replace("%%", "%")
                 for n, (_, _, text) in settings.items()}

    def put(name, value, source):
        setattr(s, name, value)
        s.sources[name] = source

    for source, changes in layers:
        for name, value in changes.items():
            put(name, value, source)
    for number, whom in follow(args.follow, departures).items():
        where, name, _, paper, code, source = departures[number]
        applies = all(facts[k] in (v if isinstance(v, tuple) else (v,)) for k, v in where.items())
        value = {"recommended": None, "paper": paper, "code": code}[whom]
        if applies and value is not None:
            put(name, value, f"{number}={whom}: {source}")
    for name in settings:
        given = getattr(args, name)
        if given and stage in given:
            put(name, given[stage], f"--{name.replace('_', '-')}")
    return s


def follow(text: str, departures: dict) -> dict[str, str]:
    """'code' or 'D3=code,D5=paper' -> {departure: whom}. Raises UserError."""
    if "=" not in text:
        chosen = dict.fromkeys(departures, text)
    else:
        chosen = dict((part + "=").split("=")[:2] for part in text.split(","))
    for number, whom in chosen.items():
        if number not in departures or whom not in ("recommended", "paper", "code"):
            raise UserError(
                f"--follow {text}: recommended, paper, code, or a list like D1=code,"
                f"D2=paper with D1 to D{len(departures)}"
            )
    return chosen


def choose_split(args, data, pool: str, percent: float):
    """The split that the flags, or the layout of the data, ask for; percent: --labels' default."""
    train = data.train
    ids = [i.decode("utf-8", "surrogateescape") for i in train.ids]
    if args.labels_file:
        root = None if train.root is None else train.root
        return read_split(ids, train.targets, data.classes, *args.labels_file, pool=pool, root=root)
    if data.labeled is not None and args.labels is None and args.num_labels is None:
        name = "labeled/ and unlabeled/"
        return split_of(name, ids, train.targets, data.classes, data.labeled, None, pool)
    return make_split(ids, train.targets, data.classes, number=args.num_labels,
                      seed=args.split_seed,
                      percent=None if args.num_labels else args.labels or percent, pool=pool)


def mathematics(args, split_hash: str, settings: dict) -> dict:
    """Everything that decides the numbers, flat: compared on a resume, hashed for the band.

    settings: {stage: namespace of `resolve`}.
    """
    names = {n for s in settings.values() for n in vars(s)}
    flat = {k: v for k, v in vars(args).items() if k not in HOW_TO_RUN | names}
    flat["split"] = split_hash
    for stage, s in settings.items():
        flat |= {f"{stage}.{k}": v for k, v in vars(s).items()
                 if k not in ("sources", "micro_batch")}
    return flat


def stored_args(args, script: str):
    """The flags of the run that --eval names, with today's flags for how and where to run."""
    stored = log.read_log(Path(args.eval))[0]
    if stored.get("script") != script:
        raise UserError(f"--eval {args.eval}: a run of {stored.get('script')}.py, "
                        f"not of {script}.py")
    now = {k: v for k, v in vars(args).items() if k in HOW_TO_RUN and (k != "data_path" or v)}
    return SimpleNamespace(**{**stored["args"], **now})


