"""The README's quickstart works when pasted, and the page stays short enough to be read."""

import code
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_quickstart_works_line_by_line(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    # As a Python prompt takes it: each line on its own, expressions are echoed, errors go to stderr.
    prompt = code.InteractiveConsole()
    for block in blocks:
        assert len(block.splitlines()) <= 6
        for line in block.splitlines():
            assert not prompt.push(line), f"not a complete statement: {line}"
    printed = capsys.readouterr()
    assert printed.err == ""
    differences = [float(text) for text in re.findall(r"tensor\((\S+)\)", printed.out)]
    assert len(differences) == 2
    assert len(blocks) == 4
    assert "tensor([1, 1]) tensor([31, 31])" in printed.out  # a decoding step of logits that determine nothing
    assert max(differences) < 1e-5  # fp32, two computations of one norm


def test_the_readme_fits_a_few_screens():
    assert len(README.splitlines()) <= 150
