"""Real text that is always at hand: the project's documents, or its own source where only the package is installed."""

from importlib.resources import files
from pathlib import Path


def find_checkout() -> Path | None:
    """The source checkout this package was installed from in place, or the one around the current directory."""
    package = Path(__file__).resolve()
    for folder in (package.parents[3], Path.cwd(), *Path.cwd().parents):
        if (folder / "bench" / "run.py").is_file() and (folder / "csrc" / "core").is_dir():
            return folder
    return None


def project_text(checkout: Path | None) -> tuple[str, str]:
    """(text, where it is from)."""
    if checkout is not None:
        documents = [path for path in (checkout / "README.md", checkout / "CONTRIBUTING.md") if path.is_file()]
        documents += sorted((checkout / "docs").glob("*.md"))
        text = "\n".join(path.read_text(encoding="utf-8") for path in documents)
        if text.strip():
            return text, f"{len(documents)} documents of this checkout"
    sources = sorted(
        (entry for package in ("tokenweave_ops", "tokenweave_models.common") for entry in files(package).iterdir()),
        key=lambda entry: entry.name,
    )
    sources = [entry for entry in sources if entry.name.endswith(".py")]
    return "\n".join(entry.read_text(encoding="utf-8") for entry in sources), "the package's own Python source"
