"""Rules about the Python packages: who may import whom, and who loads shared libraries."""

import re
from pathlib import Path

from tree import dotted_uses, families, imported_modules, python_files, rule

PACKAGES = ("tokenweave_ops", "python/tokenweave_models")


@rule
def python_families_apart(root: Path) -> list[str]:
    """What two families need moves down into tokenweave_ops/_*.py; what two systems need, into their common."""
    problems = []
    names = families(root)
    for path in python_files(root, "tokenweave_ops"):
        if path.stem in names:
            others = {f"tokenweave_ops.{place}{name}" for name in names - {path.stem} for place in ("", "reference.")}
            for line, module in imported_modules(root, path):
                if any(module == other or module.startswith(other + ".") for other in others):
                    problems.append(f"{path.relative_to(root)}:{line}: imports another family: {module}")
    models = root / "python" / "tokenweave_models"
    systems = {folder.name for folder in models.iterdir() if folder.is_dir()} if models.is_dir() else set()
    for path in python_files(root, "python/tokenweave_models"):
        own = path.relative_to(models).parts[0]
        if own in systems:
            for line, module in imported_modules(root, path):
                parts = module.split(".")
                if parts[0] == "tokenweave_models" and len(parts) > 1 and parts[1] in systems - {own, "common"}:
                    problems.append(f"{path.relative_to(root)}:{line}: imports another system: {module}")
    return problems


@rule
def ops_do_not_know_models(root: Path) -> list[str]:
    """Nothing points back up."""
    return [
        f"{path.relative_to(root)}:{line}: tokenweave_ops may not import {module}"
        for path in python_files(root, "tokenweave_ops")
        for line, module in imported_modules(root, path)
        if module.split(".")[0] == "tokenweave_models"
    ]


@rule
def models_use_public_ops(root: Path) -> list[str]:
    """The models are the first users of the package: what they cannot do with its public functions, nobody can."""
    problems = []
    for path in python_files(root, "python/tokenweave_models"):
        names = [*imported_modules(root, path), *dotted_uses(path)]
        for line, name in sorted(set(names)):
            parts = name.split(".")
            private = parts[0] == "tokenweave_ops" and any(re.match(r"_(?!_)", part) for part in parts[1:])
            if private or parts[:2] == ["torch", "ops"]:
                problems.append(f"{path.relative_to(root)}:{line}: not a public name of tokenweave_ops: {name}")
    return problems


@rule
def only_library_loads_binaries(root: Path) -> list[str]:
    """One place loads shared libraries, so that one place says why it cannot. Only test builds have `_host`, a Python
    extension module, which testing.py imports from the directory of the libraries."""
    loaders = re.compile(
        r"(ctypes|cffi|_ctypes)(\..*)?|torch\.(ops|classes)\.load_library|torch\.utils\.cpp_extension(\..*)?"
        r"|importlib\.machinery\.ExtensionFileLoader|importlib\.util\.spec_from_file_location"
    )
    extension_loader = re.compile(r"importlib\..*")
    return [
        f"{path.relative_to(root)}:{line}: only tokenweave_ops/_library.py loads shared libraries: {name}"
        for path in python_files(root, *PACKAGES)
        if path.relative_to(root).as_posix() != "tokenweave_ops/_library.py"
        for line, name in sorted({*imported_modules(root, path), *dotted_uses(path)})
        if loaders.fullmatch(name) and not (path.name == "testing.py" and extension_loader.fullmatch(name))
    ]
