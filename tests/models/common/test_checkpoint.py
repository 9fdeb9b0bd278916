"""A folder of safetensors files: what is read, how much of it, and the sentence for each way it can be broken."""

import json
import re
import subprocess
import sys
import threading

import pytest
import torch

safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed: no checkpoint can be read")

from safetensors.torch import save_file  # noqa: E402
from tokenweave_models.common.checkpoint import LocalCheckpoint, StoredTensor, read_json  # noqa: E402
from tokenweave_models.common.errors import UserError  # noqa: E402

A = torch.arange(48.0).view(6, 8)
B = torch.arange(5, dtype=torch.bfloat16)
C = torch.arange(6, dtype=torch.float16).view(3, 2)


@pytest.fixture
def folder(tmp_path):
    """A and B in one file, C in another."""
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": A, "b": B}, tmp_path / "one.safetensors")
    save_file({"c": C}, tmp_path / "two.safetensors")
    write_index(tmp_path, a="one.safetensors", b="one.safetensors", c="two.safetensors")
    return tmp_path


def write_index(folder, **files):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


# ------------------------------------------------------------------------------------------------------------- reading


def test_names_shapes_and_dtypes_are_known_at_once(folder):
    checkpoint = LocalCheckpoint(folder)
    assert dict(checkpoint.tensors) == {
        "a": StoredTensor("one.safetensors", (6, 8), "F32"),
        "b": StoredTensor("one.safetensors", (5,), "BF16"),
        "c": StoredTensor("two.safetensors", (3, 2), "F16"),
    }
    assert checkpoint.bytes_read == 0


@pytest.mark.parametrize(
    "name, dim, begin, end, expected",
    [
        ("a", 0, 0, None, A),
        ("a", 0, 2, 4, A[2:4]),
        ("a", 1, 3, 8, A[:, 3:]),
        ("a", 0, 6, 6, A[:0]),  # the last rank's part of a small vocabulary
        ("b", 0, 1, 4, B[1:4]),
        ("c", 1, 1, 2, C[:, 1:]),
    ],
)
def test_a_slice_is_what_was_asked_for_and_is_counted(folder, name, dim, begin, end, expected):
    checkpoint = LocalCheckpoint(folder)
    part = checkpoint.read(name, dim, begin, end)
    assert part.dtype == expected.dtype
    assert torch.equal(part, expected)
    assert checkpoint.bytes_read == expected.numel() * expected.element_size()


def test_one_file_needs_no_index(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": A}, tmp_path / "model.safetensors")
    assert torch.equal(LocalCheckpoint(tmp_path).read("a"), A)


def test_a_slice_outside_the_tensor_is_refused(folder):
    with pytest.raises(ValueError, match=r"^LocalCheckpoint: a slice of a must be within 0 to 6, got 4 to 7$"):
        LocalCheckpoint(folder).read("a", 0, 4, 7)


MAPPED_BY_A_SLICE = """
import re, sys
from tokenweave_models.common.checkpoint import LocalCheckpoint

def resident_kib():
    status = open("/proc/self/status").read()
    return sum(int(re.search(rf"{kind}:\\s+(\\d+) kB", status)[1]) for kind in ("RssFile", "RssAnon"))

checkpoint = LocalCheckpoint(sys.argv[1])
checkpoint.read("large", 0, 0, 1).clone()  # what any first read brings with it
before = resident_kib()
part = checkpoint.read("large", 0, 4096, 8192)
untouched = resident_kib() - before
total = part.sum()
print(untouched, resident_kib() - before, checkpoint.bytes_read)
"""


def test_the_rest_of_a_tensor_never_enters_memory(tmp_path):
    """A quarter of 32 MiB, measured by the pages that the process holds."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    (tmp_path / "config.json").write_text("{}")
    save_file({"large": torch.ones(16384, 512)}, tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", MAPPED_BY_A_SLICE, tmp_path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    untouched_kib, touched_kib, bytes_read = map(int, done.stdout.split())
    assert bytes_read == 2048 + 4096 * 2048
    assert untouched_kib < 1024
    assert 8192 <= touched_kib + 256 < 8192 + 4096


def test_threads_share_one_checkpoint(folder):
    checkpoint, wrong = LocalCheckpoint(folder), []

    def read_often():
        for _ in range(100):
            if not torch.equal(checkpoint.read("a", 1, 2, 6), A[:, 2:6]):
                wrong.append("a")

    threads = [threading.Thread(target=read_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert checkpoint.bytes_read == 4 * 100 * 6 * 4 * 4


# ------------------------------------------------------------------------------------------------------ broken folders


def refused(folder) -> str:
    with pytest.raises(UserError) as raised:
        LocalCheckpoint(folder)
    return str(raised.value)


def test_a_folder_that_is_none(tmp_path):
    assert refused("meta-llama/Llama-3.1-8B") == (
        "meta-llama/Llama-3.1-8B: no such folder. Models are read from a local folder and never downloaded"
    )
    (tmp_path / "file").touch()
    assert refused(tmp_path / "file").startswith(f"{tmp_path / 'file'}: is not a folder.")
    assert refused(tmp_path) == f"{tmp_path}: has no config.json, so it is not the folder of a Hugging Face model"


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert refused(tmp_path) == f"{tmp_path}: has neither model.safetensors nor model.safetensors.index.json"
    (tmp_path / "pytorch_model.bin").touch()
    assert refused(tmp_path).endswith("index.json; pytorch_model.bin cannot be read, only safetensors")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    assert refused(folder).endswith("index.json: must have a weight_map from tensors to files")


def test_an_index_that_names_missing_files(folder):
    write_index(folder, a="one.safetensors", **{f"x{i}": f"{i}.safetensors" for i in range(5)})
    assert refused(folder) == (
        f"{folder}: 5 of 6 weight files are missing: 0.safetensors, 1.safetensors, 2.safetensors and 2 more "
        "(named in model.safetensors.index.json)"
    )


@pytest.mark.parametrize("file", ["../one.safetensors", "/one.safetensors", 7])
def test_an_index_that_leads_out_of_the_folder(folder, file):
    write_index(folder, a=file)
    assert refused(folder).endswith(f"files must be named without a folder, got {file}")


def test_an_index_that_disagrees_with_the_files(folder):
    write_index(folder, a="one.safetensors", b="one.safetensors", c="two.safetensors", d="two.safetensors")
    assert refused(folder).endswith("names what the files do not hold: d in two.safetensors")
    write_index(folder, a="one.safetensors", c="two.safetensors")
    assert refused(folder).endswith("does not name what the files hold: b in one.safetensors")
    write_index(folder, a="two.safetensors", b="one.safetensors", c="two.safetensors")
    assert refused(folder).endswith("does not name what the files hold: a in one.safetensors")


def test_a_file_that_is_cut_off_or_something_else(folder):
    path = folder / "two.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"version https://git-lfs.github.com/spec/v1\n", b"\xff" * 64):
        path.write_bytes(content)
        assert refused(folder).startswith(f"{path}: is cut off or not a safetensors file: ")


def test_a_file_that_vanishes_is_named_when_it_is_read(folder):
    checkpoint = LocalCheckpoint(folder)
    (folder / "two.safetensors").unlink()
    with pytest.raises(UserError, match="two.safetensors: cannot be read: No such file"):
        checkpoint.read("c")
    assert torch.equal(checkpoint.read("a"), A)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON: "),
        (b"\xff\xfe", "is not JSON: "),
        (b"[1]", "must be a JSON object, got list"),
    ],
)
def test_broken_json(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="^" + re.escape(f"{path}: {message}")):
        read_json(path)


def test_json_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(str(tmp_path))}: has no config.json$"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory$"):
        read_json(tmp_path)


def test_without_the_package_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert refused(folder) == "safetensors is not installed; run: pip install 'tokenweave-ops[models]'"
