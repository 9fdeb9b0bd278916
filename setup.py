"""Packaging: `build_ext` runs CMake through build_support.py; the libraries fit every Python 3 and torch >= 2.11."""

import shutil
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build does not put the project's directory there

import build_support  # noqa: E402

try:  # Python's own venv brings a setuptools that is older than pyproject.toml's `license` and than bdist_wheel below
    build_support.check_setuptools(setuptools.__version__)
except build_support.BuildError as error:
    raise SystemExit(f"error: {error}") from None

from setuptools import Extension, find_packages, setup  # noqa: E402
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

PACKAGES = ("tokenweave_ops", "tokenweave_models")


class BuildPython(build_py):
    def run(self):
        # build/lib outlives a build: without this, a module deleted since would still go into the wheel.
        if not self.editable_mode:
            for package in PACKAGES:
                shutil.rmtree(Path(self.build_lib) / package, ignore_errors=True)
        super().run()


class BuildLibraries(build_ext):
    def run(self):
        in_tree = self.inplace or self.editable_mode
        package = ROOT / "tokenweave_ops" if in_tree else Path(self.build_lib) / "tokenweave_ops"
        try:
            build_support.build(package / "lib", python_specific=in_tree)
        except build_support.BuildError as error:
            raise SystemExit(f"error: {error}") from None

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}

    def get_source_files(self):
        return []


class PlatformWheel(bdist_wheel):
    def get_tag(self):
        _python, _abi, platform = super().get_tag()
        return "py3", "none", platform


setup(
    packages=find_packages(include=["tokenweave_ops*"]) + find_packages("python"),
    package_dir={"tokenweave_models": "python/tokenweave_models"},
    package_data={"tokenweave_ops": ["py.typed"]},
    # A placeholder: it makes setuptools call build_ext and mark the wheel as belonging to a platform.
    ext_modules=[Extension("tokenweave_ops._libraries", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
)
