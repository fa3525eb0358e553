"""Run any row of docs/results.md again, over seeds, and compare it with what is committed.

  python benchmarks/reproduce.py --list                 the rows and their commands
  python benchmarks/reproduce.py semi_vit/digits/prob   run its seeds side by side, one thread each;
                                                        say whether the mean lies inside the band
  python benchmarks/reproduce.py NAME ... --write       the same, and keep the logs in docs/logs
  python benchmarks/reproduce.py --table                docs/results.md, bands.json from docs/logs

Rows on photographs name $SSL_DATA: the folder that holds cifar10/, imagenette/ and camvid/, each as
the README's section on data describes it. Rows without a log in docs/logs have not been run yet.

Nothing in docs/results.md is typed by hand: every number comes from a log in docs/logs, every
sentence from docs/results.head.md and docs/results.notes.json (one note per table).
"""

import argparse
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

from common.log import read_log  # noqa: E402
from common.report import recipe_hash  # noqa: E402

# name: (table, what, command, seeds); --seed and --split-seed vary together. A list of commands:
# all but the last prepare it, and {pretrain} stands for the folder of the first one's run; the
# first may be another row's name, whose runs are then used. A fifth entry: the stages that the row
# is about, the last of them its result; rows with one command share its runs.
ROWS = {
    "semi_vit/digits/sup": (
        "Semi-ViT on the digits, 80 labels", "supervised, the stage that all start from",
        "semi_vit.py --method sup", 3),
    "semi_vit/digits/sup_long": (
        "Semi-ViT on the digits, 80 labels", "supervised, as many updates as both stages",
        "semi_vit.py --method sup --epochs 2176", 3),
    "semi_vit/digits/fixmatch": (
        "Semi-ViT on the digits, 80 labels", "FixMatch (m = 0)",
        "semi_vit.py --method fixmatch", 1),
    "semi_vit/digits/ema_teacher": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher, no mixing",
        "semi_vit.py --method ema_teacher", 3),
    "semi_vit/digits/mixup": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher + Pseudo Mixup",
        "semi_vit.py --unlabeled-mix mixup", 1),
    "semi_vit/digits/mixup+": (
        "Semi-ViT on the digits, 80 labels", "EMA-Teacher + Pseudo Mixup+",
        "semi_vit.py --unlabeled-mix mixup+", 1),
    "semi_vit/digits/prob": (
        "Semi-ViT on the digits, 80 labels", "Semi-ViT (probabilistic pseudo mixup)",
        "semi_vit.py", 3),
    "semi_vit/digits/mae_prob": (
        "Semi-ViT on the digits, 80 labels", "the same after MAE on all images (stage 1)",
        ["semi_mae.py --method mae",
         "semi_vit.py --init {pretrain}/mae_pretrain_vit_digits.pth"], 3),
    "semi_mae/digits/sup": (
        "Semi-MAE on the digits, 80 labels", "supervised, the stage that all start from",
        "semi_mae.py --method sup", 3),
    "semi_mae/digits/sup_long": (
        "Semi-MAE on the digits, 80 labels", "supervised, as many updates as both stages",
        "semi_mae.py --method sup --epochs 2200", 3),
    "semi_mae/digits/fixmatch": (
        "Semi-MAE on the digits, 80 labels", "FixMatch (no branch)",
        "semi_mae.py --method fixmatch", 3),
    "semi_mae/digits/semi_mae": (
        "Semi-MAE on the digits, 80 labels", "Semi-MAE", "semi_mae.py", 3),
    "simclrv2/digits/sup": (
        "SimCLRv2 on the digits, 80 labels", "labels only, weak augmentation as for fine-tuning",
        "simclrv2.py", 3, ["sup"]),
    "simclrv2/digits/sup_strong": (
        "SimCLRv2 on the digits, 80 labels", "labels only, strong augmentation",
        "simclrv2.py --method sup --augment strong", 3),
    "simclrv2/digits/linear": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, linear classifier on h",
        "simclrv2.py", 3, ["pretrain", "linear"]),
    "simclrv2/digits/finetune": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, fine-tuned",
        "simclrv2.py", 3, ["pretrain", "finetune"]),
    "simclrv2/digits/distill": (
        "SimCLRv2 on the digits, 80 labels", "pretrained, fine-tuned, distilled",
        "simclrv2.py", 3, ["pretrain", "finetune", "distill"]),
    "semiformer/digits/sup": (
        "Semiformer on the digits, 80 labels", "supervised, the stage that all start from",
        "semiformer.py --method sup", 3),
    "semiformer/digits/sup_long": (
        "Semiformer on the digits, 80 labels", "supervised, as many updates as both stages",
        "semiformer.py --method sup --epochs 1100", 3),
    "semiformer/digits/semiformer": (
        "Semiformer on the digits, 80 labels", "Semiformer", "semiformer.py", 3),
    "semiformer/third/cnn_sup": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: CNN, supervised",
        "semiformer.py --arch conv_digits --method sup --epochs 367", 3),
    "semiformer/third/cnn_vanilla": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: CNN, Vanilla",
        "semiformer.py --arch conv_digits --epochs sup=167,semi=40", 3),
    "semiformer/third/trans_sup": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: transformer, supervised",
        "semiformer.py --arch vit_digits --method sup --epochs 367", 3),
    "semiformer/third/trans_vanilla": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: transformer, Vanilla",
        "semiformer.py --arch vit_digits --epochs sup=167,semi=40", 3),
    "semiformer/third/conv_labeled": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: both, Conv-labeled",
        "semiformer.py --method conv_labeled --epochs sup=167,semi=40", 3),
    "semiformer/third/semiformer": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 1: Semiformer",
        "semiformer.py --epochs sup=167,semi=40", 3),
    "semiformer/third/convmixer": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 3: ViT + ConvMixer",
        "semiformer.py --arch vit_convmixer_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/pit": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 3: PiT + Conv",
        "semiformer.py --arch pit_conv_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/pl_trans": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 6: labels from the transformer",
        "semiformer.py --pseudo-source trans --epochs sup=167,semi=40", 1),
    "semiformer/third/pl_fuse": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 6: labels from both",
        "semiformer.py --pseudo-source fuse --epochs sup=167,semi=40", 1),
    "semiformer/third/conv_conv": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 7: C+C",
        "semiformer.py --arch conv_conv_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/vit_vit": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Table 7: V+V",
        "semiformer.py --arch vit_vit_digits --epochs sup=167,semi=40", 1),
    "semiformer/third/mae": (
        "Semiformer on the digits, 80 labels, a third of the epochs",
        "Semi-MAE's Table 2: with the MAE branch",
        "semiformer.py --mae-weight 1 --epochs sup=167,semi=40", 1),
    "s4former/scenes/sup": (
        "S4Former on digit scenes, 30 of 1,000 labelled",
        "pretraining and supervised stage, that all start from",
        "s4former.py --method sup", 3),
    "s4former/scenes/sup_long": (
        "S4Former on digit scenes, 30 of 1,000 labelled",
        "supervised, as many updates as both stages",
        "s4former.py --method sup --iterations sup=1400", 3),
    "s4former/scenes/s4former": (
        "S4Former on digit scenes, 30 of 1,000 labelled", "S4Former",
        "s4former.py", 3),
}

_THIRD = {  # Tables S2 and S3 and the supplement's variants: all from one supervised stage
    "mean_teacher": ("mean teacher (Table S3: colour jitter alone)", "--method mean_teacher", 3),
    "base": ("Base: CutMix (Table S2, no part)", "--method base", 3),
    "shuffle": ("Base + PatchShuffle", "--method base --shuffle 0.5", 3),
    "pasa": ("Base + PASA", "--method base --pasa ours", 3),
    "ncr": ("Base + NCR", "--method base --ncr ncr", 3),
    "s4former": ("Base + all three: S4Former", "", 3),
    "shuffle_pasa": ("Base + PatchShuffle + PASA", "--ncr off", 1),
    "pasa_ncr": ("Base + PASA + NCR", "--shuffle 0", 1),
    "shuffle_ncr": ("Base + PatchShuffle + NCR", "--pasa off", 1),
    "s3_cutout": ("Table S3: CutOut", "--method base --strong cutout", 1),
    "s3_mixunmix": ("Table S3: Mix/UnMix", "--method base --strong mixunmix", 1),
    "s3_classmix": ("Table S3: ClassMix", "--method base --strong classmix", 1),
    "s3_shuffle": ("Table S3: PatchShuffle alone", "--method mean_teacher --shuffle 0.5", 1),
    "s3_shuffle_mixunmix": ("Table S3: PatchShuffle + Mix/UnMix",
                            "--method base --strong mixunmix --shuffle 0.5", 1),
    "s3_shuffle_classmix": ("Table S3: PatchShuffle + ClassMix",
                            "--method base --strong classmix --shuffle 0.5", 1),
    "pasa_rand": ("Base + PASA, mask rand", "--method base --pasa rand", 1),
    "pasa_reverse1": ("Base + PASA, mask reverse1", "--method base --pasa reverse1", 1),
    "pasa_reverse2": ("Base + PASA, mask reverse2", "--method base --pasa reverse2", 1),
    "pasa_product": ("Base + PASA, product, alpha 50",
                     "--method base --pasa product --pasa-alpha 50", 1),
    "ncr_all": ("Base + All-CR in the place of NCR", "--method base --ncr all_sq", 1),
    "soft": ("Base, soft pseudo-labels", "--method base --pseudo soft", 1),
    "unimatch": ("UniMatch", "--method unimatch", 1),
    "unimatch_ours": ("UniMatch + ours", "--method unimatch --with-ours", 1),
    "augseg": ("AugSeg", "--method augseg", 1),
    "augseg_ours": ("AugSeg + ours", "--method augseg --with-ours", 1),
}
ROWS |= {f"s4former/third/{name}": (
    "S4Former on digit scenes, a third of stage semi's iterations", what,
    ["s4former/scenes/sup",
     f"s4former.py --stage semi --init {{pretrain}} --iterations semi=267 {flags}".strip()], seeds)
    for name, (what, flags, seeds) in _THIRD.items()}


def commands_of(name: str) -> list[str]:
    commands = ROWS[name][2]
    return [commands] if isinstance(commands, str) else commands


def shown(name: str) -> str:
    words = [shown(c) if c in ROWS else f"`python {c}`" for c in commands_of(name)]
    return ", then ".join(words)


def runs_of(name: str, seed: int) -> list[str]:
    """Folder of each command's run, and name of its log; the last one is the row's result."""
    first = next(n for n in ROWS if ROWS[n][2] == ROWS[name][2])  # rows may share a command
    base = f"{first.replace('/', '-')}-seed{seed}"
    before = [runs_of(c, seed)[-1] if c in ROWS else f"{base}-before{k}"
              for k, c in enumerate(commands_of(name)[:-1], 1)]
    return [*before, base]


def log_file(run: str) -> Path:
    return ROOT / "docs" / "logs" / f"{run}.jsonl"


def run_seed(name: str, seed: int, folder: Path, before) -> list[dict]:
    """The runs of a row, one thread, from the root of the project; returns the last one's log.

    before: futures of the same seed of rows that this one starts from.
    """
    for run in before:
        run.result()
    outputs = [folder / run for run in runs_of(name, seed)]
    for output, command in zip(outputs, commands_of(name)):
        if command in ROWS:
            continue  # its row has run before, see main
        shutil.rmtree(ROOT / output, ignore_errors=True)
        flags = ["--seed", str(seed), "--split-seed", str(seed), "--output", str(output)]
        words = [os.path.expandvars(word.replace("{pretrain}", str(outputs[0])))
                 for word in shlex.split(command)]
        with open(ROOT / f"{output}.txt", "w") as text:
            code = subprocess.run([sys.executable, *words, *flags], cwd=ROOT, stdout=text,
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
    for stage, (mean, spread) in band_of(logs)["stages"].items():
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
    for name, (title, what, *_) in ROWS.items():
        logs = committed(name)
        if not logs:
            continue
        if title != table:
            if table:
                lines += ["", notes.get(table, "")]
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
        if last != "sup":
            before = logs if "sup" in results_of(logs[0]) else committed(name, before=True)
            starts = [score(results_of(log)["sup"]) for log in before]
            gains = [score(e) - s for e, s in zip(ends, starts)]
            start, gain = (f"{statistics.mean(starts):.1f}",
                           f"{statistics.mean(gains):+.1f} (least {min(gains):+.1f})")
            also = {"ema_top1": "", "ema_miou": "", "top1_conv": "conv ", "top1_trans": "trans "}
            teacher = ", ".join(f"{word}{statistics.mean(e[key] for e in ends):.1f}"
                                for key, word in also.items() if key in ends[0]) or "-"
        stages = [r for log in logs for r in results_of(log, name).values()]
        stages += [r for log in committed(name, before=True) for r in results_of(log).values()]
        updates = sum(r["updates"] for r in stages) // len(logs)
        minutes = sum(r["seconds"] for r in stages) / len(logs) / 60
        each = ", ".join(f"{score(e):.1f}" for e in ends)
        lines.append(f"| {what} | {how} | {each} | {start} | {gain} | {teacher} | {updates} "
                     f"| {minutes:.1f} | `{name}`: {shown(name)} |")
        first = logs[0][0]
        bands[recipe_hash(first["recipe"])] = {"name": name, **band_of(logs)}
        lines.append(f"<!-- {name}: commit {first['commit']}, torch {first['torch']}, "
                     f"timm {first['timm']}, {first['hardware']}; splits "
                     f"{', '.join(log[0]['recipe']['split'][:12] for log in logs)} -->")
    lines += ["", notes.get(table, "")]
    rows = [x for x in lines if x.startswith("<!--")]
    lines = [x for x in lines if not x.startswith("<!--")]
    lines += ["", "## How each was run", "",
              *[f"- `{x[5:-4].replace(': ', '`: ', 1)}" for x in rows], ""]
    (ROOT / "docs" / "results.md").write_text("\n".join(lines))
    (ROOT / "docs" / "bands.json").write_text(json.dumps(bands, indent=1) + "\n")
    print(f"docs/results.md, docs/bands.json: {len(bands)} rows")


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("names", nargs="*", help="rows to run, see --list; a prefix such as "
                   "semi_vit/digits takes all below it")
    p.add_argument("--list", action="store_true", help="print the rows")
    p.add_argument("--jobs", type=int, default=os.cpu_count(),
                   help="runs side by side, one thread each")
    p.add_argument("--write", action="store_true",
                   help="keep the logs in docs/logs and make the table again")
    p.add_argument("--table", action="store_true",
                   help="make docs/results.md from docs/logs, run nothing")
    p.add_argument("--folder", type=Path, default=Path("runs/reproduce"), help="where the runs go")
    args = p.parse_args()
    if args.list or not (args.names or args.table):
        for name, (_, what, _, seeds, *_) in ROWS.items():
            print(f"{name:<32} {seeds} seed(s)  {shown(name).replace('`', '')}   # {what}")
        return
    names = [n for n in ROWS if any(n == x or n.startswith(x + "/") for x in args.names)]
    names = list(dict.fromkeys(m for n in names for m in (*commands_of(n)[:-1], n) if m in ROWS))
    if args.names and not names:
        p.error(f"no row named {' '.join(args.names)}; see --list")
    if "SSL_DATA" not in os.environ and any("$SSL_DATA" in shown(n) for n in names):
        p.error("set SSL_DATA to the folder that holds cifar10/, imagenette/ and camvid/")
    (ROOT / args.folder).mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {}
        for name in names:
            if runs_of(name, 0)[-1] not in runs:
                before = [runs[runs_of(c, 0)[-1]] for c in commands_of(name) if c in ROWS]
                runs[runs_of(name, 0)[-1]] = [  # jobs begin in order: what one waits for has begun
                    pool.submit(run_seed, name, seed, args.folder, [b[seed] for b in before])
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
