"""Run any row of docs/results.md again, over seeds, and compare it with what is committed.

  python benchmarks/reproduce.py --list                 the rows and their commands
  python benchmarks/reproduce.py semi_vit/digits/prob   run its seeds side by side, one thread each;
                                                        say whether the mean lies inside the band
  python benchmarks/reproduce.py NAME ... --write       the same, and keep the logs in docs/logs
  python benchmarks/reproduce.py NAME ... --reuse       go on where an earlier call was stopped
  python benchmarks/reproduce.py --table                docs/results.md, bands.json from docs/logs
  python benchmarks/reproduce.py NAME ... --curves PNG  accuracy of rows while they train, from
                                                        docs/logs: mean and range of the seeds

Rows on photographs name $SSL_DATA: the folder that holds cifar10/, imagenette/ and camvid/, each as
the README's section Photographs says. Rows without a log in docs/logs have not been run yet.

Every number of a table in docs/results.md comes from a log in docs/logs, every
sentence from docs/results.head.md and docs/results.notes.json (a list of points per table).
"""

import argparse
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rows import ROWS  # noqa: E402
from common.log import read_log  # noqa: E402
from common.report import recipe_hash  # noqa: E402
from common.splits import UserError  # noqa: E402


def commands_of(name: str) -> list[str]:
    commands = ROWS[name][2]
    return [commands] if isinstance(commands, str) else commands


def shown(name: str) -> str:
    words = [shown(c) if c in ROWS else f"`python {c}`" for c in commands_of(name)]
    return ", then ".join(words)


def runs_of(name: str, seed: int) -> list[str]:
    """Folder of each run, and name of its log, of all that prepare a row and, last, its own.

    A row that is prepared by one with fewer seeds shares its runs among its own.
    """
    first = next(n for n in ROWS if ROWS[n][2] == ROWS[name][2])  # rows may share a command
    base = f"{first.replace('/', '-')}-seed{seed}"
    before = [runs_of(c, seed % ROWS[c][3]) if c in ROWS else [f"{base}-before{k}"]
              for k, c in enumerate(commands_of(name)[:-1], 1)]
    return [*itertools.chain(*before), base]


def preparing(name: str) -> list[str]:
    """The rows that `name` starts from, first to last, and itself."""
    rows = [c for c in commands_of(name)[:-1] if c in ROWS]
    return [*itertools.chain(*map(preparing, rows)), name]


def log_file(run: str) -> Path:
    return ROOT / "docs" / "logs" / f"{run}.jsonl"


def finished(output: Path, words: list[str]) -> bool:
    """Whether a run of exactly this command lies in `output`, with its results."""
    try:
        log = read_log(ROOT / output)
    except UserError:
        return False
    return log[0].get("command") == words and "results" in log[-1]


def run_seed(name: str, seed: int, folder: Path, before, reuse=False) -> list[dict]:
    """The runs of a row, one thread, from the root of the project; returns the last one's log.

    before: futures of the same seed of rows that this one starts from. reuse: leave a finished run
    of the same command as it is.
    """
    for run in before:
        run.result()
    outputs = [folder / run for run in runs_of(name, seed)]
    own = [c for c in commands_of(name) if c not in ROWS]  # the others have run before, see main
    for k, command in enumerate(own, len(outputs) - len(own)):
        output, start = outputs[k], str(outputs[k - 1])  # {pretrain}: the run just before
        words = [os.path.expandvars(word.replace("{pretrain}", start))
                 for word in shlex.split(command)]
        words += ["--seed", str(seed), "--split-seed", str(seed), "--output", str(output)]
        if reuse and finished(output, words):
            continue
        shutil.rmtree(ROOT / output, ignore_errors=True)
        with open(ROOT / f"{output}.txt", "w") as text:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=text,
                                  stderr=subprocess.STDOUT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        if code:
            sys.exit(f"{name} seed {seed} ended with code {code}: see {output}.txt")
    return read_log(ROOT / outputs[-1])


def results_of(log: list[dict], name: str | None = None) -> dict:
    """Results of a run's stages; name: of those that this row is about."""
    results = log[-1]["results"]
    stages = ROWS[name][4] if name and len(ROWS[name]) > 4 else results
    return {stage: results[stage] for stage in stages}


def summary(values: list[float]) -> tuple[float, float]:
    """(mean, sample standard deviation; 0 for a single value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def metric_of(result: dict) -> str | None:
    """The number that a stage is judged by; None where it has none (a pretraining)."""
    return next((key for key in ("top1", "miou") if key in result), None)


def score(result: dict) -> float:
    return result[metric_of(result)]


def band_of(logs: list[list[dict]]) -> dict:
    first = results_of(logs[0])
    scores = {s: summary([score(results_of(log)[s]) for log in logs])
              for s in first if metric_of(first[s])}
    return {"seeds": len(logs), "stages": {s: [round(x, 3) for x in v] for s, v in scores.items()}}


def committed(name: str, before=False) -> list[list[dict]]:
    """A log for each seed; before: those of the runs that prepared them, in any order."""
    runs = [runs_of(name, seed) for seed in range(ROWS[name][3])]
    part = slice(0, -1) if before else slice(-1, None)
    files = [log_file(run) for of_seed in runs for run in of_seed[part]]
    if not all(f.exists() for f in files):
        return []
    return [[json.loads(line) for line in f.read_text().splitlines()] for f in files]


def compare(name: str, logs: list[list[dict]]):
    """Print the new mean beside the committed band: two spreads, at least one point, each way."""
    old = committed(name)
    for stage, (mean, spread) in band_of(logs)["stages"].items():  # none of a pretraining
        line = f"{name}  {stage}: {mean:.2f} +- {spread:.2f} ({len(logs)} seeds)"
        if old:
            centre, width = band_of(old)["stages"][stage]
            width = max(2 * width, 1.0)
            inside = abs(mean - centre) <= width
            line += f"   committed {centre:.2f} +- {width:.2f}: {'inside' if inside else 'OUTSIDE'}"
        print(line)


def write_table():
    """docs/results.md and docs/bands.json, from the committed logs alone."""
    lines, bands, table = [(ROOT / "docs" / "results.head.md").read_text().rstrip()], {}, None
    notes = json.loads((ROOT / "docs" / "results.notes.json").read_text())
    notes = {title: ["", *[f"- {point}" for point in points]] for title, points in notes.items()}
    for name, (title, what, *_) in ROWS.items():
        logs = committed(name)
        if not logs or title is None:  # not run, or a pretraining: counted where it is used
            continue
        if title != table:
            lines += notes.get(table, [])
            table = title
            kind = {"miou": "mIoU", "top1": "top-1"}[
                metric_of(list(results_of(logs[0]).values())[-1])]
            lines += ["", f"## {title}", "",
                      f"| what | {kind}, last stage | each seed | its supervised stage | gain "
                      "| teacher, or each head | updates | minutes "
                      "| name for reproduce.py, command |",
                      "|---|---|---|---|---|---|---|---|---|"]
        last = list(results_of(logs[0], name))[-1]
        ends = [results_of(log)[last] for log in logs]
        mean, spread = summary([score(e) for e in ends])
        how = (f"{mean:.1f} ± {spread:.1f} ({len(logs)} seeds)" if len(logs) > 1
               else f"{mean:.1f} (single run)")
        start = gain = teacher = "-"
        before = [x for x in committed(name, before=True) if "sup" in results_of(x)]
        before = logs if "sup" in results_of(logs[0]) else before
        if last != "sup" and len(before) == len(logs):
            starts = [score(results_of(log)["sup"]) for log in before]
            gains = [score(e) - s for e, s in zip(ends, starts)]
            start, gain = (f"{statistics.mean(starts):.1f}",
                           f"{statistics.mean(gains):+.1f} (least {min(gains):+.1f})")
            also = {"ema_top1": "", "ema_miou": "", "top1_conv": "conv ", "top1_trans": "trans "}
            teacher = ", ".join(f"{word}{statistics.mean(e[key] for e in ends):.1f}"
                                for key, word in also.items() if key in ends[0]) or "-"
        stages = [r for log in logs for r in results_of(log, name).values()]
        if not (name.startswith("simclrv2/") and last == "sup"):  # labels only, never pretrained
            stages += [r for log in committed(name, before=True) for r in results_of(log).values()]
        updates = sum(r["updates"] for r in stages) // len(logs)
        minutes = sum(r["seconds"] for r in stages) / len(logs) / 60
        each = ", ".join(f"{score(e):.1f}" for e in ends)
        lines.append(f"| {what} | {how} | {each} | {start} | {gain} | {teacher} | {updates} "
                     f"| {minutes:.1f} | `{name}`: {shown(name)} |")
        first = logs[0][0]
        bands[recipe_hash(first["recipe"])] = {"name": name, **band_of(logs)}
        commits = ", ".join(dict.fromkeys(log[0]["commit"] for log in logs))  # of each seed
        lines.append(f"<!-- {name}: commit {commits}, torch {first['torch']}, "
                     f"timm {first['timm']}, {first['hardware']}; splits "
                     f"{', '.join(log[0]['recipe']['split'][:12] for log in logs)} -->")
    lines += notes.get(table, [])
    rows = [x for x in lines if x.startswith("<!--")]
    lines = [x for x in lines if not x.startswith("<!--")]
    lines += ["", "## How each was run", "",
              *[f"- `{x[5:-4].replace(': ', '`: ', 1)}" for x in rows], ""]
    (ROOT / "docs" / "results.md").write_text("\n".join(lines))
    (ROOT / "docs" / "bands.json").write_text(json.dumps(bands, indent=1) + "\n")
    print(f"docs/results.md, docs/bands.json: {len(bands)} rows")


def draw_curves(names: list[str], path: Path):
    """Score over the updates of a row's last run, mean and range over seeds, one line a row."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.6))
    for name in names:
        logs = committed(name)
        seeds = []
        for log in logs:
            done, points = 0, {}
            for stage, result in results_of(log).items():
                points |= {done + x["step"]: score(x) for x in log[1:]
                           if x.get("stage") == stage and "step" in x and metric_of(x)}
                done += result["updates"]
            seeds.append(points)
        steps = sorted(set.intersection(*map(set, seeds)))
        values = [[points[step] for points in seeds] for step in steps]
        line, = axis.plot(steps, [statistics.mean(v) for v in values], label=ROWS[name][1], lw=1.4)
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2,
                          color=line.get_color(), lw=0)
    axis.set_title(f"{ROWS[names[0]][0]}: mean and range of {ROWS[names[0]][3]} seeds", fontsize=9)
    axis.set_xlabel("updates"), axis.set_ylabel(metric_of(results_of(logs[0])[stage]))
    axis.legend(fontsize=7), axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("names", nargs="*", help="rows to run, see --list; a prefix such as "
                   "semi_vit/digits takes all below it")
    p.add_argument("--list", action="store_true", help="print the rows")
    p.add_argument("--jobs", type=int, default=os.cpu_count(),
                   help="runs side by side, one thread each")
    p.add_argument("--reuse", action="store_true",
                   help="run nothing twice: what ended in --folder with the same command is taken")
    p.add_argument("--write", action="store_true",
                   help="keep the logs in docs/logs and make the table again")
    p.add_argument("--table", action="store_true",
                   help="make docs/results.md from docs/logs, run nothing")
    p.add_argument("--curves", type=Path, metavar="PNG",
                   help="draw the named rows from docs/logs, run nothing")
    p.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where the runs go")
    args = p.parse_args()
    if args.list or not (args.names or args.table):
        for name, (_, what, _, seeds, *_) in ROWS.items():
            print(f"{name:<32} {seeds} seed(s)  {shown(name).replace('`', '')}   # {what}")
        return
    names = [n for n in ROWS if any(n == x or n.startswith(x + "/") for x in args.names)]
    names = list(dict.fromkeys(itertools.chain(*map(preparing, names))))
    if args.names and not names:
        p.error(f"no row named {' '.join(args.names)}; see --list")
    if args.curves:
        missing = [n for n in args.names if n not in ROWS or not committed(n)]
        if missing:
            p.error(f"--curves: no row with logs in docs/logs is named {' '.join(missing)}")
        return draw_curves(args.names, args.curves)
    if "SSL_DATA" not in os.environ and any("$SSL_DATA" in shown(n) for n in names):
        p.error("set SSL_DATA to the folder that holds cifar10/, imagenette/ and camvid/")
    (ROOT / args.folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {}
        for name in names:
            if runs_of(name, 0)[-1] not in runs:
                before = [runs[runs_of(c, 0)[-1]] for c in commands_of(name) if c in ROWS]
                runs[runs_of(name, 0)[-1]] = [  # jobs begin in order: what one waits for has begun
                    pool.submit(run_seed, name, seed, args.folder,
                                [b[seed % len(b)] for b in before], args.reuse)
                    for seed in range(ROWS[name][3])]
        for name in names:
            compare(name, [f.result() for f in runs[runs_of(name, 0)[-1]]])
    if args.write:
        for name in names:
            for seed in range(ROWS[name][3]):
                for run in runs_of(name, seed):
                    log_file(run).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / args.folder / run / "log.jsonl", log_file(run))
    if args.write or args.table:
        write_table()


if __name__ == "__main__":
    main()
