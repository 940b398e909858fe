"""What the README says is there, is there."""
import ast
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def defined(path):
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_function_of_the_paper_table_exists():
    section = README.split("## Paper to code")[1].split("\n## ")[0]
    named = [(file, name) for row in section.splitlines()
             for file, names in re.findall(r"`(\w+\.py)`: ((?:`\w+`(?:, )?)+)", row)
             for name in re.findall(r"`(\w+)`", names)]
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
            imported = ([node.module] if isinstance(node, ast.ImportFrom)
                        else [a.name for a in node.names] if isinstance(node, ast.Import) else [])
            for other in imported:
                assert other not in order[i:], f"{name}.py imports {other}.py, which stands below it"


def test_a_file_fits_in_one_sitting_and_a_line_beside_the_paper():
    for path in (*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("tests/*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) <= 120, path.name
        assert len(lines) <= 350 or path.parent != ROOT, path.name


PAGES = [ROOT / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]


def headings(page):
    """Anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {re.sub(r"[^\w -]", "", line.strip().lower()).replace(" ", "-")
            for line in re.findall(r"^#+ (.*)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in_and_what_is_linked_exists(page):
    text = page.read_text()
    assert not re.findall(r"\b(?:RESULTS|MINI|RUN)_[A-Z]+|TODO|XXX|@@", text)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not path.startswith("http"):
            target = page.parent / path if path else page
            assert target.is_file(), link
            assert not anchor or anchor in headings(target), link


def test_the_pipelines_lines_are_those_that_mini_runs():
    import mini
    for line in mini.pipeline("runs/mini"):
        assert f"\npython {line}\n" in README


def test_the_snippet_samples_our_folder_in_diffusers(tiny, tmp_path, monkeypatch):
    """Run as it stands, on another folder: what it draws is what our sampler draws from the same noise."""
    from instaflow import InstaFlow, to_pil
    from PIL import Image
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "FlowMatchEuler" in block)
    os.symlink(tiny / "flow", tmp_path / "2rf")
    os.symlink(tiny / "teacher", tmp_path / "sd15")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    model = InstaFlow.load(tiny / "flow")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = model.solve(noise, model.text(["a red circle left of a blue square"]), model.text([""]), 25, 1.5)
    assert (latents - names["x"]).abs().max() <= 1e-5 * latents.abs().max()
    drawn, ours = (np.array(image).astype(int)
                   for image in (Image.open("diffusers.png"), to_pil(model.decode(latents))[0]))
    assert np.abs(drawn - ours).max() <= 1 and ours.std() > 1


def test_the_command_lines_have_flags_that_exist():
    """Every `python X.py ... --flag` of the README, against X's own parser words."""
    for line in re.findall(r"^(?:torchrun \S+ \S+ |python )(\w+\.py .*)$", README, re.M):
        script, *words = line.split("     #")[0].split()
        sources = "".join((ROOT / name).read_text() for name in (script, "training.py", "cli.py"))
        for flag in (w for w in words if w.startswith("--")):
            assert f'"{flag}"' in sources, f"{script} has no {flag}"
