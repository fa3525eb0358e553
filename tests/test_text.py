"""The text itself: anatomy, shared blocks, sources of flags, commands that parse, small files."""

import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import NAMES, ROOT, SCRIPTS

SECTIONS = ["CONFIG", "DATA", "MODEL", "LOSSES", "OPTIMISER AND SCHEDULES", "TRAINING STEP",
            "EVALUATION", "MAIN LOOP", "ENTRY POINT"]
SHARED = re.compile(r"^# <shared: (\S+)>\n(.*?)^# </shared>", re.S | re.M)
COMMON = sorted((ROOT / "common").glob("*.py"))
SOURCES = [ROOT / f"{name}.py" for name in NAMES]
ALLOWED = {"torch", "torchvision", "timm", "numpy", "safetensors", "common"}

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
each_source = pytest.mark.parametrize(
    "path", SOURCES + COMMON, ids=lambda p: f"{p.parent.name}/{p.name}"
)


def text_of(script) -> str:
    return (ROOT / f"{script.name}.py").read_text()


# ----- anatomy ----------------------------------------------------------------------------------


@each_script
def test_sections_are_the_same_in_the_same_order(script):
    found = re.findall(r"^# ===== (\d+)\. ([A-Z ]+?)(?:  \(.+\))? =+$", text_of(script), re.M)
    assert found == [(str(k), name) for k, name in enumerate(SECTIONS, 1)]
    assert text_of(script).count("# =====") == len(SECTIONS)


@each_script
def test_the_entry_point_is_two_lines(script):
    last = text_of(script).split("ENTRY POINT")[1].split("\n", 1)[1].strip()
    assert last == 'if __name__ == "__main__":\n    main(parse_args())'


@each_script
def test_the_first_line_names_paper_year_and_number(script):
    first = text_of(script).split("\n")[0]
    assert re.fullmatch(
        r'"""\S.* \(.+, (NeurIPS |ECCV |CVPR |)20\d\d, '
        r"(arXiv:\d{4}\.\d{5}|openaccess\.thecvf\.com)\): .+\.", first
    )


@each_script
def test_every_numbered_equation_is_cited_in_docstring_and_code(script):
    docstring = ast.get_docstring(ast.parse(text_of(script)))
    code = text_of(script).split("===== 2. DATA")[1]
    for text in (docstring, code):
        cited = {
            int(n) for group in re.findall(r"Eq\. (\d+(?:, \d+)*)", text) for n in group.split(", ")
        }
        assert cited <= set(script.equations), "an equation that the paper does not have"
    missing = set(script.equations) - {int(n) for n in re.findall(r"Eq\. (\d+)", code)}
    assert not missing, f"equations {sorted(missing)} are not cited where they are computed"


def test_shared_blocks_are_identical():
    first = {}
    for script in SCRIPTS:
        found = SHARED.findall(text_of(script))
        assert (
            text_of(script).count("# <shared:")
            == len(found)
            == text_of(script).count("# </shared>")
        )
        for name, body in found:
            where, text = first.setdefault(name, (script.name, body))
            assert body == text, f"block {name!r}: {script.name} differs from {where}"
    assert first


@each_script
def test_nothing_is_imported_but_the_few_libraries_and_common(script):
    tree = ast.parse(text_of(script))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import breaks a copied script"
            imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) <= ALLOWED


@each_script
def test_main_is_importable_and_small(script):
    tree = ast.parse(text_of(script))
    sizes = {
        n.name: n.end_lineno - n.lineno + 1
        for n in ast.walk(tree)
        if isinstance(n, ast.FunctionDef)
    }
    assert {
        "main",
        "run_stage",
        "parse_args",
        "derive",
        "build_model",
        "evaluate",
        "view_lists",
    } <= sizes.keys()
    assert sizes["main"] <= 130
    at_top = [type(n).__name__ for n in tree.body]
    allowed = {
        "Expr",
        "Import",
        "ImportFrom",
        "Assign",
        "AugAssign",
        "For",
        "FunctionDef",
        "ClassDef",
        "If",
    }
    assert set(at_top) <= allowed and at_top.count("If") == 1


# ----- flags ------------------------------------------------------------------------------------


def parser_of(script, monkeypatch):
    """The script's ArgumentParser, caught when it parses."""
    import argparse

    seen = []
    parse = argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args",
                      lambda self, *a, **k: seen.append(self) or parse(self, *a, **k))
        script.module().parse_args([])
    return seen[0]


@each_script
def test_every_flag_names_its_source_in_square_brackets(script, monkeypatch):
    actions = [a for a in parser_of(script, monkeypatch)._actions if a.dest != "help"]
    assert len(actions) > 20
    for action in actions:
        assert action.help and re.search(r"\[[^\[\]]+\]$", action.help), (
            f"{action.option_strings}: {action.help}"
        )


@each_script
def test_the_flags_that_mean_the_same_in_all_scripts_exist(script, monkeypatch):
    flags = {f for a in parser_of(script, monkeypatch)._actions for f in a.option_strings}
    wanted = """--dataset --data-path --arch --method --stage --labels --num-labels --labels-file
        --split-seed --unlabeled-pool --follow --init --epochs --batch-size --lr --weight-decay
        --warmup-epochs --accum-steps --device --dtype --compile --workers --seed --deterministic
        --output --resume --save-every --print-every --eval --predict --dry-run
        --max-bad-images""".split()
    assert set(wanted) <= flags, set(wanted) - flags


@each_script
@pytest.mark.parametrize("row", ["defaults", "recipes"])
def test_every_key_of_a_recipe_is_a_setting(script, row):
    """A misspelt key would be taken in silence."""
    module = script.module()
    if row == "defaults":
        for name, (kind, default, _) in module.SETTINGS.items():
            assert default.keys() == set(module.STAGES), name
            assert all(
                v is None or isinstance(v, kind) or kind is float for v in default.values()
            ), name
    for key, recipe in module.RECIPES.items():
        assert recipe["source"], key
        for stage, changes in recipe.items():
            if stage != "source":
                assert stage in (*module.STAGES, *module.METHODS), (key, stage)
                assert changes.keys() <= module.SETTINGS.keys(), (
                    key,
                    stage,
                    changes.keys() - module.SETTINGS.keys(),
                )
    for name, changes in module.METHODS.items():
        assert changes.keys() <= module.SETTINGS.keys(), name
    assert tuple(module.STAGES) == tuple(script.updates)


@each_script
@pytest.mark.parametrize(
    "argv, named",
    [
        ("--arch resnet9000", "--arch"),
        ("--labels 0", "--labels"),
        ("--labels 101", "--labels"),
        ("--labels 1 --num-labels 10", "--num-labels"),
        ("--epochs many", "--epochs"),
        ("--epochs nostage=3", "--epochs"),
        ("--no-such-flag", "--no-such-flag"),
        ("--save-every 0", "--save-every"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(script, argv, named, capsys):
    with pytest.raises(SystemExit) as end:
        script.module().parse_args(argv.split())
    assert end.value.code == 2 and named in capsys.readouterr().err.splitlines()[-1]


# ----- documents --------------------------------------------------------------------------------


def commands(path) -> list[tuple[str, str]]:
    """(script, arguments) of every command in a document that runs a script of this project."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    line = re.compile(r"(?:python3?|torchrun|srun)\b[^\n`|]*?\b([a-z_0-9]+)\.py\b([^\n`|]*)")
    end = re.compile(r" {3,}|  #| &&")  # a remark beside the command, or the next command
    runs = [m for m in line.finditer(text) if "benchmarks/" not in m[0]]
    return [(m[1], end.split(m[2])[0]) for m in runs]


def check_commands(path):
    found = commands(path)
    for name, arguments in found:
        assert (ROOT / f"{name}.py").exists(), f"{path.name}: no {name}.py here: {arguments}"
        try:
            importlib.import_module(name).parse_args(shlex.split(arguments.replace("...", "")))
        except SystemExit as end:
            assert end.code == 0, f"{path.name}: python {name}.py {arguments}"
    return found


@pytest.mark.parametrize("name", ["README.md"])
def test_every_command_in_the_readme_parses(name):
    if not (ROOT / name).exists():
        pytest.skip("README.md is not written yet")
    found = check_commands(ROOT / name)
    assert set(NAMES) <= {script for script, _ in found}, f"{name} shows no command of some script"
    assert any(not arguments.strip() for _, arguments in found), "the bare command is missing"


def test_every_command_in_the_pages_parses():
    for path in sorted((ROOT / "docs").glob("*.md")):
        check_commands(path)


@each_script
def test_every_command_in_the_docstring_parses(script, tmp_path):
    page = tmp_path / "docstring.md"
    page.write_text(ast.get_docstring(ast.parse(text_of(script))))
    assert len(check_commands(page)) >= 3


# ----- sizes and requirements -------------------------------------------------------------------


@each_source
def test_lines_are_at_most_100_long(path):
    long = [k for k, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not long, f"{path.name}: lines {long[:20]}"


@pytest.mark.parametrize("path", COMMON, ids=lambda p: p.name)
def test_common_has_small_files_without_a_paper_in_them(path):
    text = path.read_text()
    assert len(text.splitlines()) < 200
    hits = re.findall(
        r"\bEq\. ?\d|\bTables? \d|\bSec\. ?\d|\bFig\. ?\d|arXiv|\bApp\. [A-Z]\b", text
    )
    assert not hits, f"{path.name} cites a paper: {hits}"
    imported = re.findall(r"^\s*(?:from|import) ([a-z_0-9]+)", text, re.M)
    assert not set(imported) & set(NAMES), "common/ must not know a script"


def test_requirements_are_lower_bounds_with_a_reason():
    lines = [x for x in (ROOT / "requirements.txt").read_text().splitlines() if x.strip()]
    for line in lines:
        assert re.fullmatch(r"[a-z0-9_-]+(>=[\d.]+)?\s+# \S.*", line), line
    assert any(line.startswith("torch>=2.10") for line in lines)
    names = {re.match(r"[a-z0-9_-]+", line)[0] for line in lines}
    assert {"torch", "torchvision", "timm", "numpy", "pytest"} <= names
