"""Settings that a recipe, a departure or a flag decides, and where each value comes from.

A script lists them as SETTINGS = {name: (type, {stage: default}, help with [source])}; each is a
flag that takes `10` for every stage or `sup=10,semi=5` for the named ones.
"""

import math
from types import SimpleNamespace

from common.splits import UserError

# Never part of what is computed: these may change when a run goes on.
HOW_TO_RUN = set(
    "device dtype compile workers deterministic output resume save_every print_every max_bad_images"
    " predict eval dry_run data_path stop_after accum_steps attention compare checkpoint_blocks"
    .split()
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


SHARES = set(
    "drop_path reprob label_smoothing label_smoothing_u ema_decay unlabeled_cutmix crop_min".split()
)


def resolve(settings: dict, stage: str, layers: list, departures: dict, facts: dict, args,
            ignored=()):
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
        where, name, recommended, paper, code, source = departures[number]
        applies = all(facts[k] in (v if isinstance(v, tuple) else (v,)) for k, v in where.items())
        value = {"recommended": recommended, "paper": paper, "code": code}[whom]
        if applies and whom != "recommended" and value is not None:
            put(name, value, f"{number}={whom}: {source}")
        elif applies and getattr(s, name, None) == recommended:
            put(name, recommended, f"{number}: {source}")
    for name in settings:
        given = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if given and stage in given and name not in ignored:
            put(name, given[stage], flag)
        value, top = getattr(s, name), 1 if name in SHARES else math.inf
        if isinstance(value, float) and not 0 <= value <= top or value == math.inf:
            raise UserError(f"{flag} {value:g}: from 0 to {top:g}")
        if name == "beta2" and value >= 1:  # Adam divides by 1 - beta2^t
            raise UserError(f"{flag} {value:g}: from 0 to below 1")
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
