"""The project's own files: environments agree, imports point one way, the wheel is complete, links and notebooks are clean."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from scanlib import __version__
from tests import links

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(path for path in ROOT.glob("notebooks/**/*.ipynb") if ".ipynb_checkpoints" not in path.parts)
LESSONS = [path for path in NOTEBOOKS if path.parent.name == "notebooks"]
ids = lambda path: path.stem  # noqa: E731


def requirements() -> dict[str, set[str]]:
    """[project] dependencies and extras of pyproject.toml, as written."""
    text = (ROOT / "pyproject.toml").read_text()
    base = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1]
    extra = re.search(r"^test = \[(.*?)\]", text, re.S | re.M)[1]
    return {"base": set(re.findall(r'"([^"]+)"', base)), "test": set(re.findall(r'"([^"]+)"', extra))}


def test_environments_in_step():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    conda = {line.replace("pytorch>=", "torch>=") for line in conda if isinstance(line, str)} - {"pip"}
    wanted = requirements()
    assert conda == wanted["base"] | wanted["test"] | {"python>=3.10"}
    assert 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()


def test_lower_bounds_only():
    assert not [name for names in requirements().values() for name in names if re.search("==|<|~=", name)]


def test_version_and_citation():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0" and "2603.06523" in citation["references"][0]["url"]


# each level may import the levels above it in this list, and files of its own folder
LEVELS = [
    {"structure"},
    {"layers", "targets", "loss", "masking", "decoders", "data", "plots"},
    {"hooks"},
    {"training"},
    {"models", "trainer"},
    {"explainers"},
    {"metrics", "scouter", "scan"},
    {"explorer", "cli"},
]


def imported_modules(path):
    """Dotted names below scanlib that a file imports, as ("metrics", "removal")."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "scanlib":
            parts = tuple(node.module.split(".")[1:])
            yield from [parts] if parts else [(alias.name,) for alias in node.names]


def package_files():
    return [path for path in (ROOT / "scanlib").rglob("*.py") if path.parent != ROOT / "scanlib" or path.name[0] != "_"]


@pytest.mark.parametrize("path", package_files(), ids=lambda path: path.relative_to(ROOT / "scanlib").as_posix())
def test_imports_point_one_way(path):
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    own = path.relative_to(ROOT / "scanlib").with_suffix("").parts[0]
    for module in imported_modules(path):
        assert module[0] == own or level[module[0]] < level[own], f"{path.name} imports scanlib.{'.'.join(module)}"


def test_no_import_circle_inside_a_folder():
    imports = {}
    for path in package_files():
        parts = path.relative_to(ROOT / "scanlib").with_suffix("").parts
        imports[parts] = {module for module in imported_modules(path) if module[0] == parts[0] and len(parts) > 1}
    while leaves := {name for name, found in imports.items() if not found & set(imports)}:
        imports = {name: found for name, found in imports.items() if name not in leaves}
    assert not imports, f"these files import each other: {sorted(imports)}"


def test_folders_are_small_and_the_package_stays_thin():
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / "scanlib").rglob("*.py")}
    folders = [path.parent for path in lines]
    heart = ("layers", "hooks", "targets", "masking", "loss", "decoders", "trainer", "scan")
    assert max(folders.count(folder) for folder in set(folders)) <= 12
    assert sum(lines[ROOT / "scanlib" / f"{name}.py"] for name in heart) <= 1500
    assert sum(lines.values()) <= 10400


def test_packages_are_listed_in_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*?)^\]", text, re.S | re.M)[1]))
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in (ROOT / "scanlib").rglob("__init__.py")}
    assert listed == folders | {"scanlib.checkpoints"}


def test_wheel_installed_elsewhere_runs_the_readme_example(tmp_path):
    pytest.importorskip("setuptools", "70.1")
    source = tmp_path / "source"
    for name in ("scanlib", "data/checkpoints"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    with zipfile.ZipFile(next(source.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    assert (site / "scanlib" / "py.typed").is_file()
    example = re.search(r"## An example\n\n```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)[1]
    check = f"import scanlib; assert scanlib.__file__.startswith({str(site)!r}), scanlib.__file__\n{example}"
    check += "\nassert confidence.shape == heat_map.shape == (64, 64) and reconstruction.shape == (64, 64, 3)"
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_readme_tree_names_what_exists():
    tree = (ROOT / "README.md").read_text("utf-8").split("## The tree")[1]
    named = set(re.findall(r"^  (\w+)(?:\.py|/) ", tree, re.M))
    found = {path.stem for path in (ROOT / "scanlib").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert named == {name for name in found if name[0] != "_"}


def test_links_are_the_projects():
    for path in links.files():
        text = path.read_text("utf-8")
        assert links.rewritten(text) == text, f"{path.name}: run `make links`"


def test_links_are_rewritten_and_others_left_alone(monkeypatch):
    monkeypatch.setattr(links, "address", lambda: "new/place")
    text = "colab.research.google.com/github/old/x/blob/main/a.ipynb github.com/old/x.git github.com/gompanghee/SCAN"
    assert (
        links.rewritten(text)
        == "colab.research.google.com/github/new/place/blob/main/a.ipynb github.com/new/place.git github.com/gompanghee/SCAN"
    )


def test_readme_names_every_notebook_and_only_files_that_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    for path in LESSONS:
        assert f"notebooks/{path.name}" in readme
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", readme):
        assert (ROOT / link).exists(), link


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_notebook_is_executed_once_and_clean(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size < 1.2e6
    code = cells(path, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
        assert not [output for output in cell["outputs"] if output.get("name") == "stderr"], (
            "progress bars or warnings were committed"
        )
    text = path.read_text("utf-8")
    assert "/work/" not in text and "/tmp/" not in text and "/root/" not in text


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_lesson_begins_and_ends_as_every_lesson(path):
    first, setup = source(cells(path, "markdown")[0]), source(cells(path, "code")[0])
    assert f"https://colab.research.google.com/github/{links.address()}/blob/main/notebooks/{path.name}" in first
    assert re.search(r"Needs: .*CPU \d+ (s|min)", first)
    assert setup == source(cells(LESSONS[0], "code")[0])
    last = source(cells(path, "markdown")[-1])
    assert "Recap" in last and "Exercises" in last and "solutions/" in last
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", "\n".join(source(cell) for cell in cells(path, "markdown"))):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize("path", LESSONS, ids=ids)
def test_code_cells_are_short(path):
    for cell in cells(path, "code")[1:]:
        assert len([line for line in source(cell).splitlines() if line.strip()]) <= 20, source(cell)
