"""The rules of the house, each a pure function of a source tree: rule(root) -> violations, one sentence each.

test_rules.py runs each over this tree, and over a small tree with a planted violation to prove that it can fail.
"""

import rules_cpp
import rules_project
import rules_python
from tree import Rule

RULES: dict[str, Rule] = {
    name: value
    for module in (rules_cpp, rules_python, rules_project)
    for name, value in vars(module).items()
    if getattr(value, "is_rule", False)
}
