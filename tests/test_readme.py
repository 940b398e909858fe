"""What the README says is there, is there."""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def defined(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_function_of_the_paper_table_exists():
    section = README.split("## Paper to code")[1].split("\n## ")[0]
    named = [(file, name) for row in section.splitlines() for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", row) for name in re.findall(r"`(\w+)`", names)]
    assert len(named) > 20
    for file, name in named:
        assert name in defined(ROOT / file), f"{file} has no {name}"


def test_every_file_of_the_guide_exists_and_every_module_is_in_it():
    section = README.split("## The files")[1].split("\n## ")[0]
    listed = re.findall(r"^\| \**`(\w+\.py)`", section, re.M)
    assert sorted(listed) == sorted(p.name for p in ROOT.glob("*.py"))


def test_a_file_imports_only_files_above_it():
    section = README.split("## The files")[1].split("\n## ")[0]
    order = [name[:-3] for name in re.findall(r"^\| \**`(\w+\.py)`", section, re.M)]
    for i, name in enumerate(order):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            for other in imported:
                assert other not in order[i:], f"{name}.py imports {other}.py, which stands below it"


def test_nothing_is_left_to_fill_in_and_pictures_exist():
    assert not re.findall(r"\b(?:RESULTS|MINI|RUN)_[A-Z]+|TODO|XXX", README)
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_pipelines_lines_are_those_that_mini_runs():
    import mini
    for line in mini.pipeline("."):
        if not line.startswith("experiments.py"):
            assert line.replace("./", "") in README
