"""Rules about the project as a whole: every op has all of its files, and the documents are true to the tree."""

import ast
import re
from pathlib import Path

from tree import cpp_code, cpp_files, families, family_folders, files, matches, python_files, python_tree, rule

TEMPLATE = "template_op"  # complete, but not offered to users: the README does not list it
DOCUMENTED = ("tokenweave_ops", "python/tokenweave_models", "bench", "examples")


def ops_of(folder: Path) -> list[str]:
    """The ops a family registers, from its glue: TOKENWEAVE_OP("name(...)..."."""
    names: list[str] = []
    for path in sorted(folder.glob("*_torch.cpp")):
        names += re.findall(r'TOKENWEAVE_OP\(\s*"(\w+)\(', cpp_code(path, keep_strings=True))
    return names


@rule
def families_are_complete(root: Path) -> list[str]:
    """Every kernel has its contract, its CPU twin and its glue; every family its Python, reference, tests and bench."""
    problems = []
    for folder in family_folders(root):
        name = folder.name
        launchers = sorted(folder.glob("*.cu"))
        ops = sorted({launcher.name.split(".")[0] for launcher in launchers})  # op.fp32.cu holds instantiations of op
        wanted = [folder / f"{op}{ending}" for op in ops for ending in (".h", "_cpu.cpp")] + [
            root / "tokenweave_ops" / f"{name}.py",
            root / "tokenweave_ops" / "reference" / f"{name}.py",
            *(root / "tests" / name / f"test_{kind}.py" for kind in ("numerics", "contract", "compile", "errors")),
            root / "bench" / f"{name}.py",
        ]
        problems += [f"{name}: {path.relative_to(root)} is missing" for path in wanted if not path.is_file()]
        # Closely related ops may share device code and glue, so these are asked of the family.
        for pattern in ("*.cu", "*.cuh", "*_torch.cpp", "*_host.cpp"):
            if not any(folder.glob(pattern)):
                problems.append(f"{name}: csrc/{name} has no {pattern}")
        if not ops_of(folder):
            problems.append(f"{name}: no TOKENWEAVE_OP in csrc/{name}/*_torch.cpp")
    return problems


def public_ops_of(folder: Path) -> list[str]:
    """Without those that have no public function: x_out is x(out=...), x_backward a gradient, workspace_x a method."""
    return [op for op in ops_of(folder) if not op.endswith(("_out", "_backward")) and not op.startswith("workspace_")]


@rule
def ops_are_in_the_readme(root: Path) -> list[str]:
    """Every op has a line in the README's table, except the template's."""
    readme = root / "README.md"
    lines = readme.read_text(encoding="utf-8").splitlines() if readme.is_file() else []
    return [
        f"README.md: no table line names `{op}` of {folder.name}"
        for folder in family_folders(root)
        if folder.name != TEMPLATE
        for op in public_ops_of(folder)
        if not any(line.startswith("|") and f"`{op}`" in line for line in lines)
    ]


@rule
def ops_are_tested_by_name(root: Path) -> list[str]:
    """Every op is named in its family's numerics and error tests."""
    problems = []
    for folder in family_folders(root):
        for kind in ("numerics", "errors"):
            paths = sorted((root / "tests" / folder.name).glob(f"test_*{kind}.py"))
            text = "".join(path.read_text(encoding="utf-8") for path in paths)
            problems += [
                f"tests/{folder.name}/test_{kind}.py: does not name the op {op}"
                for op in public_ops_of(folder)
                if paths and not re.search(rf"\b{op}\b", text)
            ]
    return problems


@rule
def build_names_no_family(root: Path) -> list[str]:
    """Adding an op touches no central file of the build: sources are found by where they are."""
    build_files = [root / "CMakeLists.txt", root / "setup.py", root / "build_support.py", *files(root, "cmake")]
    return [
        violation
        for path in build_files
        if path.is_file()
        for name in sorted(families(root))
        for violation in matches(
            root, path, path.read_text(encoding="utf-8"), rf"\b{name}\b", "the build may not name a family"
        )
    ]


# ------------------------------------------------------------------------------------------------------------ documents


@rule
def files_say_what_they_are(root: Path) -> list[str]:
    """Every header begins with a comment (a .cu and .cpp is explained by its header), every module with a docstring."""
    problems = []
    for path in cpp_files(root):
        if path.suffix in {".h", ".cuh"} and not path.read_text(encoding="utf-8").startswith("//"):
            problems.append(f"{path.relative_to(root)}: does not begin with a comment that says what it is")
    for path in python_files(root, *DOCUMENTED):
        if ast.get_docstring(python_tree(path)) is None:
            problems.append(f"{path.relative_to(root)}: has no module docstring")
    return problems


@rule
def sources_are_ascii(root: Path) -> list[str]:
    """Typographic quotes and dashes break grep and some terminals."""
    endings = {".py", ".toml", ".sh", ".cmake", ".txt", ".h", ".cuh", ".cu", ".cpp"}
    return [
        f"{path.relative_to(root)}:{number}: not ASCII: {line.strip()}"
        for path in files(root)
        if path.suffix in endings
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.isascii()
    ]


@rule
def no_machine_paths(root: Path) -> list[str]:
    """What is committed must mean the same on every machine. (This folder plants such paths and is left out.)"""
    text_files = {
        ".py",
        ".md",
        ".toml",
        ".sh",
        ".txt",
        ".yaml",
        ".yml",
        ".json",
        ".cmake",
        ".h",
        ".cuh",
        ".cu",
        ".cpp",
        "",
    }
    pattern = r"(?<![\w.:/~$}-])/(home|Users|root|work|mnt|media|scratch)/[\w.]+"
    problems = []
    for path in files(root):
        if path.suffix in text_files and not path.is_relative_to(root / "tests" / "architecture"):
            text = path.read_text(encoding="utf-8", errors="replace")
            problems += matches(root, path, text, pattern, "an absolute path of one machine")
    return problems


def heading_anchors(text: str) -> set[str]:
    """The anchors that renderers give to Markdown headings."""
    headings = re.findall(r"^#+\s+(.*?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@rule
def links_resolve(root: Path) -> list[str]:
    """Relative links of the documents lead to files, and to headings, that exist."""
    problems = []
    for path in files(root):
        if path.suffix != ".md":
            continue
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"", text):
            link = target[0] or target[1]
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            found = (path.parent / file) if file else path
            if not found.exists():
                problems.append(f"{path.relative_to(root)}: link to a missing file: {link}")
            elif anchor and found.suffix == ".md" and anchor not in heading_anchors(found.read_text(encoding="utf-8")):
                problems.append(f"{path.relative_to(root)}: link to a missing heading: {link}")
    return problems


def first_match(pattern: str, path: Path) -> str | None:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE) if path.is_file() else None
    return found and found[1]


@rule
def changelog_has_the_version(root: Path) -> list[str]:
    """The version of the package is the CHANGELOG's newest entry."""
    version = first_match(r'^__version__ = "([^"]+)"', root / "tokenweave_ops" / "__init__.py")
    entry = first_match(r"^## \[?([0-9][\w.]*)", root / "CHANGELOG.md")
    if version is None:
        return ["tokenweave_ops/__init__.py: no __version__"]
    if entry != version:
        return [f"CHANGELOG.md: the newest entry is {entry}, the package's version is {version}"]
    return []
