"""Reading the source tree for the rules: which files, and their code without comments and strings."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

Rule = Callable[[Path], list[str]]

CPP_SUFFIXES = {".h", ".cuh", ".cu", ".cpp"}
# Directories of csrc that are not a family of ops.
NOT_FAMILIES = {"core", "simt", "torch", "host"}
SKIPPED = re.compile(r"\.git|\.venv.*|build|dist|shared|__pycache__|\..*_cache|\.hypothesis|.*\.egg-info|.*\.so")

_CPP_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | R"(?P<fence>\w*)\(.*?\)(?P=fence)"
      | "(?:\\.|[^"\\\n])*"
      | (?<![0-9a-zA-Z])'(?:\\.|[^'\\\n])+'""",
    re.DOTALL | re.VERBOSE,
)


def rule(function: Rule) -> Rule:
    """Marks a function as a rule; rules.py collects them."""
    function.is_rule = True
    return function


def files(root: Path, folder: str = "") -> Iterator[Path]:
    """Every file under root/folder that belongs to the project, sorted; build products and caches do not."""
    start = root / folder
    if not start.is_dir():
        return
    for path in sorted(start.iterdir()):
        if SKIPPED.fullmatch(path.name) or path == root / "tokenweave_ops" / "lib":
            continue
        if path.is_dir():
            yield from files(root, str(path.relative_to(root)))
        else:
            yield path


def cpp_files(root: Path) -> list[Path]:
    return [path for path in files(root, "csrc") if path.suffix in CPP_SUFFIXES]


def python_files(root: Path, *folders: str) -> list[Path]:
    return [path for folder in folders for path in files(root, folder) if path.suffix == ".py"]


def family_folders(root: Path) -> list[Path]:
    csrc = root / "csrc"
    if not csrc.is_dir():
        return []
    return sorted(path for path in csrc.iterdir() if path.is_dir() and path.name not in NOT_FAMILIES)


def families(root: Path) -> set[str]:
    return {folder.name for folder in family_folders(root)}


def cpp_code(path: Path, keep_strings: bool = False) -> str:
    """The file with comments, and unless kept the contents of strings, blanked out; line numbers stay."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        if match["comment"] is None:
            return text if keep_strings else '""' + "\n" * text.count("\n")
        return " " + "\n" * text.count("\n")

    return _CPP_TOKEN.sub(blank, path.read_text(encoding="utf-8"))


def python_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(root: Path, path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import; `from a import b` gives a.b, which may be a module or a name in one."""
    folders = [part for part in path.relative_to(root).parts[:-1] if part != "python"]
    for node in ast.walk(python_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = folders[: len(folders) - node.level + 1] if node.level else []
            module = [node.module] if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, *module, alias.name])


def dotted_uses(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute chain such as torch.ops.tokenweave."""
    for node in ast.walk(python_tree(path)):
        if isinstance(node, ast.Attribute):
            parts, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node.lineno, ".".join([inner.id, *reversed(parts)])


def matches(root: Path, path: Path, text: str, pattern: str, problem: str) -> list[str]:
    """One violation per match, as `csrc/x/y.cu:12: problem: matched text`."""
    return [
        f"{path.relative_to(root)}:{text.count(chr(10), 0, match.start()) + 1}: {problem}: {match.group().strip()}"
        for match in re.finditer(pattern, text, re.MULTILINE)
    ]
