"""What docs, docstrings and comments cite is there: sections of the method, files, links, pages of the site."""

import ast
import io
import json
import os
import re
import tokenize
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
METHOD = "docs/method.md"
# Folders of the repository, so that environments, runs and caches beside them are not read.
FOLDERS = ("benchmarks", "configs", "docs", "launch", "notebooks", "tests", "vir_jax")
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.*"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")))
    if path.is_file() and "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts
)
TEXTS = [name for name in FILES if name.endswith((".py", ".md", ".ipynb"))]

PATH = re.compile(r"(?<![\w/.:{}*-])[\w.*-]+(?:/[\w.*-]+)*\.(?:md|py|ipynb)\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def comments_and_docstrings(source):
    source = re.sub(r"^( *)[%!].*", r"\1pass", source, flags=re.MULTILINE)  # of notebooks
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, documented))
    return "\n".join([*comments, *filter(None, map(ast.get_docstring, nodes))])


def prose(name, text):
    """What is written for readers: a page, a notebook's cells of text, a module's comments and docstrings."""
    if name.endswith(".md"):
        return text
    if name.endswith(".py"):
        return comments_and_docstrings(text)
    cells = json.loads(text)["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    return "\n".join(
        comments_and_docstrings(source) if kind == "code" else source for kind, source in sources
    )


def read(name):
    return prose(name, (ROOT / name).read_text())


def sections():
    return set(re.findall(r"^## (\d+)\. ", (ROOT / METHOD).read_text(), re.MULTILINE))


def uncited(text, known):
    """The citations of the method in a text that name no section of it."""
    joined = " ".join(text.split())
    cited = re.findall(rf"{re.escape(METHOD)},? sections? (\d+)(?:(?:,| and| to) (\d+))?", joined)
    wrong = [f"section {number}" for pair in cited for number in pair if number and number not in known]
    # Documents are cited by their paths, not by a name in capitals.
    return wrong + re.findall(r"\b[A-Z]{4,}(?:\.md)?,? sections? \d+", joined)


def missing(text, name, files):
    """The paths in a text of `name` that are none of `files`, by themselves, from that folder, or by name alone."""

    def exists(path):
        # NAME and x stand for any name.
        path = "/".join(re.sub(r"^(NAME|x)(?=\.)", "*", part) for part in path.split("/"))
        places = [path, os.path.normpath(Path(name).parent / path)]
        return any(Path(file).match(place) for file in files for place in places)

    return [path for path in PATH.findall(text) if not exists(path)]


def test_the_method_has_its_sections():
    assert sections() == {str(number) for number in range(1, 11)}


@pytest.mark.parametrize("name", TEXTS)
def test_cited_sections_and_files_exist(name):
    text = read(name)
    assert uncited(text, sections()) + missing(text, name, FILES) == []


PAGES = [name for name in TEXTS if name.endswith(".md") and (name.startswith("docs/") or "/" not in name)]


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_resolve(name):
    folder = (ROOT / name).parent
    links = [link for link in LINK.findall(read(name)) if not re.match(r"\w+:|#", link)]
    assert [link for link in links if not (folder / link.split("#")[0]).exists()] == []


def anchors(page):
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_to_headings_resolve(name):
    included = {"docs/contributing.md": "CONTRIBUTING.md"}
    for link in LINK.findall(read(name)):
        path, _, anchor = link.partition("#")
        if not anchor or re.match(r"\w+:", link):
            continue
        target = os.path.normpath(Path(name).parent / path) if path else name
        assert anchor in anchors(ROOT / included.get(target, target)), link


def test_every_page_is_in_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for section in site["nav"] for pages in section.values() for page in listed_pages(pages)]
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in (ROOT / "docs").glob("*.md")}


def listed_pages(section):
    return [section] if isinstance(section, str) else [page for entry in section for page in entry.values()]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1400


def test_what_is_not_there_is_found():
    files = ["docs/method.md", "vir_jax/ops/grid.py"]
    assert not missing("`docs/method.md`, grid.py, ops/*.py of https://a.b/c.md", "vir_jax/x.py", files)
    assert missing("(SPEC.md section 1) and [`docs/other.md`]", "a.py", files) == ["SPEC.md", "docs/other.md"]
    assert not uncited("docs/method.md,\n    section 2", {"2"})
    assert uncited("docs/method.md, section 9, and SPEC section 1", {"2"}) == ["section 9", "SPEC section 1"]
    assert comments_and_docstrings('"""One."""\nx = "two"  # three') == "three\nOne."
