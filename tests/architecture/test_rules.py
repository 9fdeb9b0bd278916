"""Each rule holds for this tree, and each is seen to fail on a small tree with one planted violation."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from rules import RULES
from rules_project import ops_of
from tree import cpp_code, files, imported_modules

ROOT = Path(__file__).resolve().parents[2]


def make_tree(root: Path, contents: Mapping[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_tree_keeps_the_rule(rule):
    assert rule(ROOT) == []


def test_the_tree_is_seen():
    """A rule that looks at nothing would pass, so the walk must find what every rule is about."""
    seen = {path.relative_to(ROOT).as_posix() for path in files(ROOT)}
    assert {
        "README.md",
        "CHANGELOG.md",
        "pyproject.toml",
        "CMakeLists.txt",
        "csrc/core/arch.cuh",
        "csrc/torch/backend.h",
        "tokenweave_ops/_library.py",
        "python/tokenweave_models/tokenweave/model.py",
        "tests/architecture/rules.py",
    } <= seen
    assert not any(name.startswith(("tokenweave_ops/lib/", "build/", ".git/")) for name in seen)
    assert {"add_rms_norm_", "rms_norm"} <= set(ops_of(ROOT / "csrc" / "allreduce_rmsnorm"))


# A complete family `first` with one op, and what the document rules ask for. No rule complains about it.
GOOD_TREE = {
    "csrc/first/scale.h": '// Contract.\n#include "core/op.h"\n',
    "csrc/first/scale.cuh": '// Device code.\n#include "first/scale.h"\n',
    "csrc/first/scale.cu": (
        '// Launcher: says <<<, asm, __shared__ and throw here without harm.\n#include "first/scale.cuh"\n'
        "namespace tokenweave::inline TOKENWEAVE_BACKEND {\n"
        'const char* text = "asm <<< exit(1) throw";  /* cudaDeviceSynchronize() */\n'
        "static_assert(true);\n}\n"
    ),
    "csrc/first/scale_cpu.cpp": (
        '// CPU kernel.\n#include "core/op.h"\n'
        "namespace tokenweave::inline TOKENWEAVE_BACKEND::inline TOKENWEAVE_ISA {}\n"
    ),
    "csrc/first/scale_torch.cpp": (
        '// Glue.\n#include <torch/csrc/stable/tensor.h>\n#include "first/scale.h"\n#include "torch/check.h"\n'
        'void f() { throw 1; }\nTOKENWEAVE_OP("scale(Tensor x) -> Tensor", scale);\n'
        'TOKENWEAVE_OP(\n    "scale_out(Tensor x, Tensor(a!) out) -> ()", scale_out);\n'
    ),
    "csrc/first/scale_host.cpp": '// Plan binding.\n#include <pybind11/pybind11.h>\n#include "host/plan.h"\n',
    "csrc/core/arch.cuh": '// Instructions.\n#include "simt/simt.h"\nasm("bar;"); __shared__ int x;\n#if __CUDACC__\n',
    "csrc/core/launch.h": "// Launch.\ncudaLaunchKernelEx();\n",
    "csrc/core/op.h": "// Words.\n",
    "csrc/host/plan.h": "// Plans.\n#include <pybind11/pybind11.h>\n",
    "csrc/simt/simt.h": "// Emulator.\n",
    "csrc/simt/switch.cpp": '// Context switch.\nvoid f() { asm("nop"); abort(); }\n',
    "csrc/torch/check.h": "// Checks.\n#include <torch/csrc/stable/tensor.h>\n",
    "csrc/torch/backend.h": "// Backends.\n#if defined(TOKENWEAVE_BACKEND_CUDA)\n",
    "CMakeLists.txt": "project(tokenweave)\n",
    "CHANGELOG.md": "# Changelog\n\n## [1.2.0] - unreleased\n\n## [1.1.0] - 2020-01-01\n",
    "README.md": (
        "# The name\n\n[a](docs/a.md#two-words) [b](#the-name) [c](https://example.org/x)\n\n"
        "| op |\n| --- |\n| `scale` |\n"
    ),
    "docs/a.md": "## Two words\n[back](../README.md)\n```\n[not a link](nowhere.md)\n```\n",
    "tokenweave_ops/__init__.py": '"""Ops."""\nfrom tokenweave_ops.first import scale\n__version__ = "1.2.0"\n',
    "tokenweave_ops/_library.py": '"""Loads libraries."""\nimport ctypes\nctypes.CDLL("x")\n',
    "tokenweave_ops/first.py": '"""First."""\nfrom ._library import load\n',
    "tokenweave_ops/reference/first.py": '"""Reference."""\n',
    "tests/first/test_numerics.py": "scale()\n",
    "tests/first/test_contract.py": "",
    "tests/first/test_compile.py": "",
    "tests/first/test_errors.py": "scale()\n",
    "bench/first.py": '"""Bench."""\n',
    "python/tokenweave_models/one/model.py": (
        '"""Model."""\nimport tokenweave_ops\nfrom tokenweave_models.common import text\ntokenweave_ops.__version__\n'
    ),
    "python/tokenweave_models/common/text.py": '"""Text."""\n',
    "python/tokenweave_models/two/model.py": '"""Another model."""\n',
}

# rule -> trees, each the good tree with these files on top (None: without that file), and what the report must say.
PLANTS: dict[str, list[tuple[dict[str, str | None], str]]] = {
    "only_glue_includes_torch": [
        ({"csrc/first/scale.cuh": "// x\n#include <torch/csrc/stable/tensor.h>\n"}, "csrc/first/scale.cuh:2"),
        ({"csrc/core/op.h": "// x\n\n#include <ATen/ATen.h>\n"}, "csrc/core/op.h:3"),
        ({"csrc/first/scale_cpu.cpp": '// x\n#include "torch/check.h"\n'}, "csrc/first/scale_cpu.cpp:2"),
    ],
    "only_host_includes_python": [
        ({"csrc/first/scale_torch.cpp": "// x\n#include <pybind11/pybind11.h>\n"}, "scale_torch.cpp:2"),
        ({"csrc/torch/check.h": "// x\n#include <torch/extension.h>\n"}, "csrc/torch/check.h:2"),
        ({"csrc/core/op.h": "// x\n#include <Python.h>\n"}, "csrc/core/op.h:2"),
    ],
    "cpp_layers": [
        ({"csrc/second/a.h": '// x\n#include "first/scale.h"\n'}, "csrc/second/a.h:2"),
        ({"csrc/core/op.h": '// x\n#include "first/scale.h"\n'}, "csrc/core/op.h:2"),
        ({"csrc/first/scale.cu": '// x\n#include "simt/simt.h"\n'}, "csrc/first/scale.cu:2"),
        ({"csrc/simt/simt.h": '// x\n#include "core/op.h"\n'}, "csrc/simt/simt.h:2"),
        ({"csrc/first/scale.cu": '// x\n#include "../second/a.h"\n'}, "csrc/first/scale.cu:2"),
    ],
    "instructions_only_in_arch": [
        ({"csrc/first/scale.cuh": '// x\nasm volatile("nop;");\n'}, "csrc/first/scale.cuh:2"),
        ({"csrc/first/scale.cuh": "// x\n__syncthreads();\n"}, "__syncthreads"),
        ({"csrc/core/reduce.cuh": "// x\n__shfl_xor_sync(1, 2, 3);\n"}, "__shfl_xor_sync"),
        ({"csrc/first/scale.cuh": "// x\natomicAdd(p, 1);\n"}, "atomicAdd"),
        ({"csrc/first/scale.cuh": "// x\n__threadfence_system();\n"}, "__threadfence_system"),
        ({"csrc/first/scale.cuh": "// x\nv = __ldg(p);\n"}, "__ldg"),
    ],
    "one_launch": [
        ({"csrc/first/scale.cu": "// x\nkernel<<<1, 32>>>(p);\n"}, "csrc/first/scale.cu:2"),
        ({"csrc/first/scale.cu": "// x\ncudaLaunchKernel(f);\n"}, "cudaLaunchKernel"),
    ],
    "shared_memory_only_in_arch": [
        ({"csrc/first/scale.cuh": "// x\n__shared__ float sums[32];\n"}, "csrc/first/scale.cuh:2"),
    ],
    "backend_switches": [
        ({"csrc/first/scale_torch.cpp": "// x\n#if defined(TOKENWEAVE_BACKEND_SIMT)\n"}, "scale_torch.cpp:2"),
        ({"csrc/first/scale.cuh": "// x\n#ifdef __CUDA_ARCH__\n"}, "csrc/first/scale.cuh:2"),
        ({"csrc/first/scale.cu": "// x\n#if !defined(__CUDACC__)\n"}, "csrc/first/scale.cu:2"),
    ],
    "backend_namespace": [
        ({"csrc/first/scale.cu": "// x\nnamespace tokenweave {\n}\n"}, "csrc/first/scale.cu:2"),
        ({"csrc/core/op.h": "// x\nnamespace tokenweave::arch {\n}\n"}, "csrc/core/op.h:2"),
    ],
    "nothing_ends_the_process": [
        ({"csrc/first/scale.cu": "// x\nstd::exit(1);\n"}, "csrc/first/scale.cu:2"),
        ({"csrc/first/scale.cuh": "// x\nassert(i < n);\n"}, "assert("),
        ({"csrc/first/scale.cuh": "// x\n__trap();\n"}, "__trap("),
        ({"csrc/torch/check.h": "// x\nabort();\n"}, "abort("),
        ({"csrc/core/arch.cuh": '// x\nasm volatile("trap;");\n'}, "csrc/core/arch.cuh:2"),
    ],
    "only_glue_raises": [
        ({"csrc/first/scale.cu": "// x\nthrow std::runtime_error(message);\n"}, "csrc/first/scale.cu:2"),
        ({"csrc/core/op.h": "// x\nSTD_TORCH_CHECK(ok);\n"}, "STD_TORCH_CHECK"),
    ],
    "nothing_synchronizes_or_allocates": [
        ({"csrc/first/scale.cu": "// x\ncudaDeviceSynchronize();\n"}, "cudaDeviceSynchronize"),
        ({"csrc/first/scale.cu": "// x\ncudaMemcpy(a, b, n, kind);\n"}, "cudaMemcpy("),
        ({"csrc/first/scale_torch.cpp": "// x\ncudaMallocAsync(&p, n, s);\n"}, "cudaMallocAsync"),
        ({"csrc/first/scale.cu": "// x\nstream = cudaStreamLegacy;\n"}, "cudaStreamLegacy"),
    ],
    "python_families_apart": [
        (
            {"csrc/second/a.h": "", "tokenweave_ops/second.py": "from tokenweave_ops.first import scale\n"},
            "tokenweave_ops/second.py:1",
        ),
        ({"csrc/second/a.h": "", "tokenweave_ops/second.py": "\nfrom .first import scale\n"}, "second.py:2"),
        (
            {"csrc/second/a.h": "", "tokenweave_ops/reference/first.py": "from . import second\n"},
            "reference/first.py:1",
        ),
        (
            {"python/tokenweave_models/two/model.py": "import tokenweave_models.one.model\n"},
            "python/tokenweave_models/two/model.py:1",
        ),
        ({"python/tokenweave_models/two/model.py": "from ..one import model\n"}, "two/model.py:1"),
    ],
    "ops_do_not_know_models": [
        ({"tokenweave_ops/info.py": "def f():\n    import tokenweave_models.cli\n"}, "tokenweave_ops/info.py:2"),
    ],
    "models_use_public_ops": [
        ({"python/tokenweave_models/one/run.py": "from tokenweave_ops._library import load\n"}, "_library.load"),
        ({"python/tokenweave_models/one/run.py": "from tokenweave_ops import _library\n"}, "_library"),
        ({"python/tokenweave_models/one/run.py": "import tokenweave_ops\ntokenweave_ops._x()\n"}, "run.py:2"),
        ({"python/tokenweave_models/one/run.py": "import torch\ntorch.ops.tokenweave.scale(x)\n"}, "torch.ops"),
    ],
    "only_library_loads_binaries": [
        ({"tokenweave_ops/first.py": "import ctypes\n"}, "tokenweave_ops/first.py:1"),
        ({"tokenweave_ops/testing.py": "import torch\ntorch.ops.load_library(path)\n"}, "testing.py:2"),
        ({"python/tokenweave_models/one/run.py": "from torch.utils.cpp_extension import load\n"}, "cpp_extension"),
        ({"tokenweave_ops/first.py": "import importlib.util\nimportlib.util.spec_from_file_location(1)\n"}, "py:2"),
        ({"tokenweave_ops/testing.py": "from ctypes import CDLL\n"}, "testing.py:1"),
    ],
    "families_are_complete": [
        *(
            ({name: None}, f"first: {name} is missing")
            for name in (
                "csrc/first/scale.h",
                "csrc/first/scale_cpu.cpp",
                "tokenweave_ops/first.py",
                "tokenweave_ops/reference/first.py",
                "tests/first/test_numerics.py",
                "tests/first/test_contract.py",
                "tests/first/test_compile.py",
                "tests/first/test_errors.py",
                "bench/first.py",
            )
        ),
        *(
            ({f"csrc/first/scale{ending}": None}, f"csrc/first has no *{ending}")
            for ending in (".cu", ".cuh", "_torch.cpp", "_host.cpp")
        ),
        ({"csrc/first/scale_torch.cpp": '// x\n// TOKENWEAVE_OP("scale(Tensor x)")\n'}, "no TOKENWEAVE_OP"),
    ],
    "ops_are_in_the_readme": [
        ({"README.md": "`scale` outside of a table\n"}, "names `scale` of first"),
        ({"README.md": None}, "names `scale` of first"),
    ],
    "ops_are_tested_by_name": [
        ({"tests/first/test_errors.py": "rescale()\n"}, "tests/first/test_errors.py: does not name the op scale"),
        ({"tests/first/test_numerics.py": "\n"}, "tests/first/test_numerics.py"),
    ],
    "build_names_no_family": [
        ({"CMakeLists.txt": "\nadd_library(x csrc/first/scale.cu)\n"}, "CMakeLists.txt:2"),
        ({"setup.py": "families = ['first']\n"}, "setup.py:1"),
    ],
    "files_say_what_they_are": [
        ({"csrc/first/scale.h": "#pragma once\n"}, "csrc/first/scale.h"),
        ({"tokenweave_ops/first.py": "import torch\n"}, "tokenweave_ops/first.py"),
        ({"bench/first.py": ""}, "bench/first.py"),
    ],
    "sources_are_ascii": [
        ({"csrc/first/scale.h": "// one\n// 8 \u2026 16\n"}, "csrc/first/scale.h:2"),
        ({"tests/first/test_errors.py": "# \u2013\n"}, "tests/first/test_errors.py:1"),
    ],
    "no_machine_paths": [
        ({"docs/a.md": "run /home/someone/x\n"}, "docs/a.md:1"),
        ({"setup.py": "path = '/home/someone/project'\n"}, "setup.py:1"),
        ({"Makefile": "\nx:\n\tcp /root/y z\n"}, "Makefile:3"),
    ],
    "links_resolve": [
        ({"docs/a.md": "[x](missing.md)\n"}, "docs/a.md: link to a missing file: missing.md"),
        ({"README.md": "[x](docs/a.md#three-words)\n"}, "link to a missing heading"),
        ({"README.md": "![x](docs/picture.svg)\n"}, "docs/picture.svg"),
        ({"README.md": '<img src="docs/picture.svg">\n'}, "docs/picture.svg"),
    ],
    "changelog_has_the_version": [
        ({"CHANGELOG.md": "## [1.1.0]\n"}, "CHANGELOG.md: the newest entry is 1.1.0"),
        ({"CHANGELOG.md": None}, "CHANGELOG.md: the newest entry is None"),
        ({"tokenweave_ops/__init__.py": ""}, "no __version__"),
    ],
}


def test_the_template_need_not_be_in_the_readme(tmp_path):
    renamed = {
        name.replace("first", "template_op"): text.replace("first", "template_op") for name, text in GOOD_TREE.items()
    }
    renamed["README.md"] = ""
    make_tree(tmp_path, renamed)
    assert RULES["ops_are_in_the_readme"](tmp_path) == []


def test_every_rule_has_a_plant():
    assert set(PLANTS) == set(RULES)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_good_tree_keeps_the_rule(rule, tmp_path):
    assert rule(make_tree(tmp_path, GOOD_TREE)) == []


@pytest.mark.parametrize(
    ("name", "changes", "report"),
    [
        pytest.param(name, changes, report, id=f"{name}-{number}")
        for name, plants in PLANTS.items()
        for number, (changes, report) in enumerate(plants)
    ],
)
def test_a_planted_violation_is_reported(name, changes, report, tmp_path):
    contents = {path: text for path, text in (GOOD_TREE | changes).items() if text is not None}
    violations = RULES[name](make_tree(tmp_path, contents))
    assert any(report in violation for violation in violations), violations


def test_code_without_comments_and_strings(tmp_path):
    path = tmp_path / "a.cpp"
    path.write_text(
        'int a = 1\'000\'000; // "one\nchar b = \'"\'; /* two\n*/ f("three // \\" four"); R"x(five\n)")x"; six\'s;\n',
        encoding="utf-8",
    )
    code = cpp_code(path)
    assert code.count("\n") == 4
    assert "f(" in code
    assert "six" in code
    assert "000" in code
    assert not any(word in code for word in ("one", "two", "three", "four", "five"))
    assert "three" in cpp_code(path, keep_strings=True)


def test_relative_imports_are_spelled_out(tmp_path):
    make_tree(tmp_path, {"python/m/a/x.py": "from . import b\nfrom .. import c\nfrom ..d.e import f\nimport g.h\n"})
    names = [name for _, name in imported_modules(tmp_path, tmp_path / "python/m/a/x.py")]
    assert names == ["m.a.b", "m.c", "m.d.e.f", "g.h"]
