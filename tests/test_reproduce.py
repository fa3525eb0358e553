"""Every row of the results can be started, and the table is what the committed logs say."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import reproduce as R  # noqa: E402
from benchmarks.rows import ROWS  # noqa: E402


@pytest.mark.parametrize("name", ROWS)
def test_each_command_is_understood_by_its_script(name):
    for command in R.commands_of(name):
        if command in ROWS:
            assert list(ROWS).index(command) < list(ROWS).index(name), "prepared by a later row"
            continue
        script, *flags = shlex.split(command)
        module = importlib.import_module(script.removesuffix(".py"))
        module.parse_args(flags)
        assert "--seed" not in flags and "--output" not in flags  # reproduce.py gives them
        stages = ROWS[name][4] if len(ROWS[name]) > 4 and command == R.commands_of(name)[-1] else ()
        assert set(stages) <= set(module.STAGES)


def test_rows_with_one_command_share_a_run_and_others_do_not():
    runs = {}
    for name in ROWS:
        runs.setdefault(R.runs_of(name, 0)[-1], set()).add(str(ROWS[name][2]))
    assert all(len(commands) == 1 for commands in runs.values())
    assert len(runs) == len({str(row[2]) for row in ROWS.values()})


def test_a_preparation_with_one_seed_serves_all_seeds(monkeypatch):
    rows = {"a/mae": (None, "", "semi_mae.py --method mae", 1),
            "a/b": ("t", "", ["a/mae", "semi_vit.py --init {pretrain}/x.pth"], 3),
            "a/c": ("t", "", ["a/b", "semi_vit.py --stage semi --init {pretrain}"], 3)}
    monkeypatch.setattr(R, "ROWS", rows)
    assert [R.runs_of("a/b", seed) for seed in (0, 2)] == [
        ["a-mae-seed0", "a-b-seed0"], ["a-mae-seed0", "a-b-seed2"]]
    assert R.runs_of("a/c", 2) == ["a-mae-seed0", "a-b-seed2", "a-c-seed2"]
    assert R.preparing("a/c") == ["a/mae", "a/b", "a/c"]


def test_each_run_starts_from_the_one_before_it(tmp_path, monkeypatch):
    rows = {"a/mae": (None, "", "semi_mae.py --method mae", 1),
            "a/b": ("t", "", ["a/mae", "semi_vit.py --init {pretrain}/x.pth"], 2),
            "a/c": ("t", "", ["a/b", "semi_vit.py --stage semi --init {pretrain}"], 2),
            "a/d": ("t", "", ["s4former.py", "s4former.py --init {pretrain}"], 1)}
    calls = []
    monkeypatch.setattr(R, "ROWS", rows)
    monkeypatch.setattr(R, "ROOT", tmp_path)
    monkeypatch.setattr(R, "read_log", lambda folder: [])
    monkeypatch.setattr(R.subprocess, "run", lambda words, **more: calls.append(
        " ".join(words[1:])) or SimpleNamespace(returncode=0))
    for name in rows:
        R.run_seed(name, rows[name][3] - 1, Path("."), [])
    more = [f"--seed {k} --split-seed {k} --output" for k in (0, 1)]
    assert calls == [
        f"semi_mae.py --method mae {more[0]} a-mae-seed0",
        f"semi_vit.py --init a-mae-seed0/x.pth {more[1]} a-b-seed1",
        f"semi_vit.py --stage semi --init a-b-seed1 {more[1]} a-c-seed1",
        f"s4former.py {more[0]} a-d-seed0-before1",
        f"s4former.py --init a-d-seed0-before1 {more[0]} a-d-seed0"]


def test_the_committed_table_is_made_from_the_committed_logs(tmp_path, monkeypatch):
    for part in ("results.head.md", "results.notes.json", "logs"):
        target = tmp_path / "docs" / part
        target.parent.mkdir(exist_ok=True)
        target.symlink_to(ROOT / "docs" / part)
    monkeypatch.setattr(R, "ROOT", tmp_path)
    R.write_table()
    for made in ("results.md", "bands.json"):
        assert (tmp_path / "docs" / made).read_text() == (ROOT / "docs" / made).read_text(), made


def asked_for(words):
    """A command's words without what reproduce.py adds, folders by their names, in any order."""
    words, kept = iter(words), []
    for word in words:
        if word in ("--seed", "--split-seed", "--output", "--workers"):
            next(words)
        elif word == "--data-path":
            kept.append(f"{word} {Path(next(words)).name}")
        else:
            kept.append(re.sub(r"^.*-seed\d+(-before\d+)?", "{pretrain}", word))
    return sorted(kept)


@pytest.mark.parametrize("name", [n for n in ROWS if R.committed(n)])
def test_each_committed_log_is_of_the_command_beside_it(name):
    for log in R.committed(name):
        assert asked_for(log[0]["command"]) == asked_for(shlex.split(R.commands_of(name)[-1]))


def test_a_seed_outside_the_band_is_said(capsys, monkeypatch):
    name = "semi_vit/digits/prob"
    logs = R.committed(name)
    R.compare(name, logs)
    assert "inside" in capsys.readouterr().out
    monkeypatch.setattr(R, "committed", lambda name: [
        [*log[:-1], {"results": {stage: {**r, "top1": r["top1"] - 9}
                                 for stage, r in log[-1]["results"].items()}}] for log in logs])
    R.compare(name, logs)
    assert "OUTSIDE" in capsys.readouterr().out


def test_reuse_takes_a_finished_run_of_the_same_command_alone(tmp_path, monkeypatch):
    ran = []

    def script(words, **_):  # writes what a run of the script leaves
        ran.append(words[1:])
        folder = Path(words[-1])
        folder.mkdir(exist_ok=True)
        (folder / "log.jsonl").write_text(json.dumps({"command": words[1:]}) + "\n" + end)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(R, "ROWS", {"a/b": ("t", "", "semi_vit.py --tau 0.5", 1)})
    monkeypatch.setattr(R.subprocess, "run", script)
    end = ""  # stopped before its results
    R.run_seed("a/b", 0, tmp_path, [], reuse=True)
    end = json.dumps({"results": {}}) + "\n"
    for _ in range(2):
        R.run_seed("a/b", 0, tmp_path, [], reuse=True)
    assert len(ran) == 2, "the unfinished run again, the finished one not"
    monkeypatch.setitem(R.ROWS, "a/b", ("t", "", "semi_vit.py --tau 0.6", 1))
    R.run_seed("a/b", 0, tmp_path, [], reuse=True)
    assert len(ran) == 3, "another command"
    R.run_seed("a/b", 0, tmp_path, [])
    assert len(ran) == 4, "without --reuse"


def test_curves_are_drawn_from_the_logs(tmp_path, monkeypatch, capsys):
    picture = tmp_path / "c.png"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "semi_vit/digits/sup_long",
                                      "semi_vit/digits/prob", "--curves", str(picture)])
    R.main()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "gpu/camvid/base", "--curves", str(picture)])
    with pytest.raises(SystemExit):
        R.main()
    assert "gpu/camvid/base" in capsys.readouterr().err


def test_rows_on_photographs_ask_for_their_folder(monkeypatch, capsys):
    monkeypatch.delenv("SSL_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "gpu/camvid/base"])
    with pytest.raises(SystemExit):
        R.main()
    assert "SSL_DATA" in capsys.readouterr().err
