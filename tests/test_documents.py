"""The documents name what exists: links, headings, files, commands, make targets, tests."""

import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

from configs import CONFIGS

ROOT = Path(__file__).parents[1]
GUIDES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
NOTEBOOKS = tuple(sorted((ROOT / "docs" / "notebook").glob("*.md")))
ROOMS = "mdn_jax|pallas_kernels|train|configs|benchmarks|examples|tests|docs"
TRAIN_COMMANDS = ("tokenize", "plot", "NAME", "CONFIG", "my_run.toml", "runs", "examples")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda x: str(x.relative_to(ROOT)))


def slug(heading):
    """The anchor that a heading gets on a page."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


@cache
def anchors(path):
    return {
        slug(line.lstrip("#")) for line in path.read_text().splitlines() if re.match("#+ ", line)
    }


def code(text):
    """What stands in backticks, in one line each, and the lines of blocks."""
    yield from (" ".join(x.split()) for x in re.findall(r"`([^`]+)`", FENCE.sub("", text)))
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()


@named((*GUIDES, *NOTEBOOKS))
def test_links_lead_somewhere(path):
    lost = []
    for target in LINK.findall(FENCE.sub("", path.read_text())):
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        outside = re.match(r"[a-z]+:", target)
        if not outside and not (file.exists() and (not anchor or anchor in anchors(file))):
            lost.append(target)
    assert lost == []


@named(GUIDES)
def test_files_exist(path):
    files = {x.name for room in ROOMS.split("|") for x in (ROOT / room).rglob("*.py")}
    text = "\n".join(code(path.read_text()))
    names = re.findall(rf"(?<![\w/.-])(?:{ROOMS})/[\w./*-]*", text)
    lost = [x for x in names if not list(ROOT.glob(x.rstrip("./")))]
    lost += [x for x in re.findall(r"(?<![\w/*.-])\w+\.py\b", text) if x not in files]
    assert lost == []


def test_documents_that_the_code_names_exist():
    for room in ROOMS.split("|"):
        for file in (ROOT / room).rglob("*.py"):
            for name in re.findall(r"docs/[\w/.-]+\.(?:md|png)", file.read_text()):
                assert (ROOT / name).exists(), f"{file}: {name}"


@named((*GUIDES, *NOTEBOOKS))
def test_commands_exist(path):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    benchmarks = [
        name
        for file in (ROOT / "benchmarks").rglob("*.py")
        for name in re.findall(r"^def (\w+)\(\s*config: Annotated", file.read_text(), re.MULTILINE)
    ]
    arguments = {"benchmarks": (*benchmarks, "NAME", ""), "train": (*CONFIGS, *TRAIN_COMMANDS, "")}
    lost = []
    for text in code(path.read_text()):
        plain = text.replace(".venv/bin/", "")
        names = re.findall(r"(?<![\w./-])mdn-[a-z]+\b(?!-)", plain)
        lost += [x for x in names if x not in (*scripts, "mdn-jax")]
        for words in re.findall(r"(?:^|[\s;&(|])make ([a-z][a-z -]*)", text):
            lost += [f"make {x}" for x in words.split() if x not in targets]
        for module, argument in re.findall(r"python -m ([\w.]+)(?: ([\w.]+))?", text):
            file = ROOT / module.replace(".", "/")
            runs = file.with_suffix(".py").exists() or (file / "__main__.py").exists()
            if not runs or argument not in arguments.get(module, (argument,)):
                lost.append(f"python -m {module} {argument}")
    assert lost == []


@named((*GUIDES, *NOTEBOOKS))
def test_tests_that_are_named_exist(path):
    names = set(re.findall(r"`(test_\w+)`", path.read_text()))
    if names:
        sources = "\n".join(x.read_text() for x in (ROOT / "tests").rglob("test_*.py"))
        assert not [x for x in sorted(names) if f"def {x}(" not in sources]


@named((*GUIDES, *NOTEBOOKS))
def test_the_commands_that_went_are_not_named(path):
    assert not re.findall(r"mdn-(?:train|bench|tokenize|plot)\b", path.read_text())


def test_pictures_are_small():
    for picture in (ROOT / "docs" / "pictures").glob("*.png"):
        assert picture.stat().st_size < 150_000, picture.name


def test_a_heading_has_the_anchor_of_a_page():
    assert slug(" 7. Numerics of `q`: what, and how") == "7-numerics-of-q-what-and-how"
