"""What test_runner.py runs under torchrun: several commands on one group of ranks, which is made once.

Arguments: a folder for what comes out, another device's profile. Rank 0 writes `refusals.json`.
"""

import json
import sys
from pathlib import Path

from tokenweave_models.common.errors import UserError
from tokenweave_models.tokenweave.runner import main as runner
from tokenweave_models.tokenweave.runner.ranks import Ranks
from tokenweave_models.tokenweave.runner.reporting import Reporter

import tokenweave_ops

TINY = ["--random", "--hidden", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--intermediate", "96"]
TINY += ["--dtype", "fp32", "--device", "cpu", "--timeout-s", "30"]
# The second is longer than a chunk.
PROMPTS = ["Once upon a time", "Wave after wave of tokens, each half beside the other's sum.", "x"]
GENERATE = ["generate", *TINY, "--max-new-tokens", "10", "--chunk", "24", *PROMPTS]
LINK = ["--link-gb-s", "0.005", "--link-us", "20"]
SERVE = ["serve-bench", *TINY, *LINK, "--split", "half", "--requests", "6", "--rate", "50", "--prompt-len", "3:40"]
SERVE += ["--output-len", "1:6", "--chunk", "16", "--slots", "3"]
PREFILL = ["prefill-bench", *TINY, *LINK, "--tokens", "24", "64", "--passes", "3", "--warm-up", "1"]


class Work:
    def __init__(self, folder: Path):
        self.ranks, self.folder = Ranks("cpu", 30), folder
        self.refusals: dict[str, object] = {}

    def run(self, *arguments) -> None:
        arguments = runner.parse([str(one) for one in arguments], self.ranks.is_first)
        runner.COMMANDS[arguments.command][0].run(arguments, self.ranks, Reporter(self.ranks.is_first))

    def refused(self, name: str, *arguments, error=UserError) -> None:
        """Every rank raises, and all go on together. Notes each rank's words."""
        try:
            self.run(*arguments)
        except error as raised:
            words = f"{type(raised).__name__}: {raised}"
        else:
            words = "nothing was raised"
        self.refusals[name] = self.ranks.gather(words)

    def one_refuses(self, name: str) -> None:
        def step():
            if self.ranks.rank == 1:
                raise OSError("no such file here")

        try:
            self.ranks.attempt(step)
        except UserError as raised:
            self.refusals[name] = self.ranks.gather(str(raised))


def main(folder: Path, profile: Path) -> None:
    work = Work(folder)
    for mode in ("reference", "fused", "weave"):
        work.run(*GENERATE, "--mode", mode, "--split", "half", "--json", folder / f"{mode}.json")
    drawn = ["--temperature", "1.2", "--top-k", "50", "--top-p", "0.9", "--seed", "5"]
    work.run(*GENERATE, *drawn, "--json", folder / "drawn.json")
    if (folder / "model").is_dir():
        shared = ["--dtype", "fp32", "--device", "cpu", "--max-new-tokens", "12", PROMPTS[0]]
        work.run("generate", "--model", folder / "model", *shared, "--json", folder / "folder.json")
    work.run(*SERVE, "--json", folder / "serve.json", "--png", folder / "serve.png")
    work.run(*PREFILL, "--json", folder / "prefill.json", "--png", folder / "prefill.png")
    work.refused("heads", "prefill-bench", *TINY, "--heads", "5", "--hidden", "80", "--kv-heads", "5")
    work.refused("profile", "prefill-bench", *TINY, "--profile", profile)
    work.refused("hidden", "prefill-bench", *TINY, "--hidden", "72", "--heads", "6", "--dtype", "bf16")
    work.refused("output", "serve-bench", *TINY, "--png", "/proc/x.png")
    work.one_refuses("one")
    # Ranks that do not agree where to split: with arguments that differ, since a planner gives all the same.
    split = str(4 * (1 + work.ranks.rank))
    work.refused("split", *GENERATE, "--split", split, error=tokenweave_ops.CommunicationError)
    work.run(*GENERATE, "--json", folder / "after.json")  # all is well again
    if work.ranks.is_first:
        (folder / "refusals.json").write_text(json.dumps(work.refusals))
    work.ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
