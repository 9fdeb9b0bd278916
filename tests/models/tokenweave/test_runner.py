"""The runner as a user starts it: in one process, under torchrun, and with ranks that disagree or die."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenweave_models.common.tokenizer import ByteTokenizer
from tokenweave_models.tokenweave.batch import Batch, KVCache
from tokenweave_models.tokenweave.config import ModelConfig
from tokenweave_models.tokenweave.executor import Executor
from tokenweave_models.tokenweave.model import random_decoder
from tokenweave_models.tokenweave.reduction import EagerAddition
from tokenweave_models.tokenweave.runner import main as runner
from tokenweave_models.tokenweave.runner import prefill_bench, serve_bench, session
from tokenweave_models.tokenweave.runner.planning import Planner, shape_of
from tokenweave_models.tokenweave.runner.random_weights import random_share
from tokenweave_models.tokenweave.runner.sampling import SamplingParams, distribution, uniform
from tokenweave_models.tokenweave.runner.session import NO_LINK
from tokenweave_models.tokenweave.tensor_parallel import parts_of, shard

from tokenweave_ops import H100, EmulatedLink, PeerLost, RankDisagreement

try:
    import safetensors.torch as safetensors
    import tokenizers
except ImportError:
    safetensors = tokenizers = None

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
RUNNER = ["-m", "tokenweave_models.tokenweave"]
CONFIG = ModelConfig(vocab_size=256, hidden=64, intermediate=96, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def work():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        import runner_work

        yield runner_work


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices; and the runner sets the number for its process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def environment(**more) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"} | more


# -------------------------------------------------------------------------------------------------- over two processes


@pytest.fixture(scope="module")
def model():
    """The decoder that `--random` means, whole, in float64 made from its float32 weights."""
    return random_share(CONFIG, 0, 1, seed=0, dtype=torch.float32, device=torch.device("cpu")).double()


def save_model(model, folder: Path, prompt: str) -> None:
    """As Hugging Face lays it out, with a tokenizer of bytes in the order of their characters. Text ends with the token
    that goes on from the prompt in the fourth place or, if it came before, one of the next."""
    folder.mkdir()
    parameters = {name: value.float() for name, value in model.named_parameters()}
    tensors = {part.source: part.destination(parameters[part.parameter]).clone() for part in parts_of(CONFIG, 0, 1)}
    safetensors.save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden,
        "intermediate_size": CONFIG.intermediate,
        "num_hidden_layers": CONFIG.num_layers,
        "num_attention_heads": CONFIG.num_heads,
        "num_key_value_heads": CONFIG.num_kv_heads,
        "rms_norm_eps": CONFIG.norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "max_position_embeddings": 64,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({piece: token for token, piece in enumerate(alphabet)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    tokens = greedy_continuation(model, made.encode(prompt).ids, 12)
    eos = next(token for place, token in enumerate(tokens) if place >= 3 and token not in tokens[:place])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos]}))


@pytest.fixture(scope="module")
def over_ranks(work, model, tmp_path_factory):
    """(what was printed, the folder of what was written) of all commands on one pair of ranks."""
    folder = tmp_path_factory.mktemp("runner")
    H100.save(folder / "h100.json")
    if safetensors is not None and tokenizers is not None:
        save_model(model, folder / "model", work.PROMPTS[0])
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", HERE / "runner_work.py", folder, folder / "h100.json"],
        capture_output=True, text=True, timeout=150, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def tokens_of(report: dict) -> list[list[int]]:
    return [result["tokens"] for result in report["results"]]


@torch.inference_mode()
def true_logits(model, tokens: list[int]) -> torch.Tensor:
    """[num_tokens, vocab_size] in float64, in one pass, with nothing batched or cached."""
    count = len(tokens)
    cache = KVCache(CONFIG, 1, count, dtype=torch.float64)
    executor = Executor(model, cache, EagerAddition(count, CONFIG.hidden, torch.float64))
    return executor.logits(executor.forward(Batch.of(torch.tensor(tokens), [count], [count], [0])))


# Of a logit of this model in float32, whose std is about 0.25: a hundred times its rounding, see the test below.
FLOAT32_ERROR = 1e-5


def greedy_continuation(model, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        best = true_logits(model, tokens)[-1].topk(2)
        assert best.values[0] - best.values[1] > 2 * FLOAT32_ERROR, "float32 may decide this one differently"
        tokens.append(best.indices[0].item())
    return tokens[len(prompt) :]


def test_greedy_text_is_the_same_in_every_mode_as_by_definition(over_ranks, work, model):
    _, folder = over_ranks
    prompts = [ByteTokenizer().encode(prompt).tolist() for prompt in work.PROMPTS]
    expected = [greedy_continuation(model, prompt, 10) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(expected)
    for name in ("reference", "fused", "weave", "after"):
        report = read(folder, name)
        assert tokens_of(report) == expected, name
        assert report["world_size"] == 2 and report["seconds"] > 0
        assert [result["prompt"] for result in report["results"]] == work.PROMPTS
    exact = true_logits(model, prompts[1])
    rounded = true_logits(model, prompts[1]).float()
    assert (exact - rounded).abs().max() < FLOAT32_ERROR / 100


def test_drawn_text_is_what_the_seed_draws(over_ranks, work, model):
    _, folder = over_ranks
    params = SamplingParams(1.2, top_k=50, top_p=0.9, seed=5)
    for number, prompt in enumerate(work.PROMPTS):
        tokens = ByteTokenizer().encode(prompt).tolist()
        for token in tokens_of(read(folder, "drawn"))[number]:
            candidates, probabilities = distribution(true_logits(model, tokens)[-1].numpy(), params)
            at = candidates.tolist().index(token)
            drawn = uniform(params.seed, number, len(tokens))
            # float32 may move the bounds between two tokens, but not far.
            assert probabilities[:at].sum() - 1e-3 <= drawn <= probabilities[: at + 1].sum() + 1e-3
            tokens.append(token)


@pytest.mark.skipif(safetensors is None or tokenizers is None, reason="safetensors or tokenizers is not installed")
def test_a_folder_is_loaded_and_its_end_of_text_ends_it(over_ranks, work, model):
    _, folder = over_ranks
    made = tokenizers.Tokenizer.from_file(str(folder / "model" / "tokenizer.json"))
    prompt = made.encode(work.PROMPTS[0]).ids
    expected = greedy_continuation(model, prompt, 12)
    (eos,) = json.loads((folder / "model" / "generation_config.json").read_text())["eos_token_id"]
    length = expected.index(eos) + 1
    assert 3 < length < 12
    (result,) = read(folder, "folder")["results"]
    assert result["prompt_tokens"] == prompt
    assert result["tokens"] == expected[:length]
    assert result["text"] == made.decode(expected[:length])


def test_a_served_request_gets_what_it_gets_alone(over_ranks, work, model):
    printed, folder = over_ranks
    report = read(folder, "serve")
    arguments = runner.parse(work.SERVE, True)
    arrivals = serve_bench.arrivals_of(arguments, CONFIG.vocab_size)
    assert [one["prompt_len"] for one in report["requests"]] == [len(arrival.prompt) for arrival in arrivals]
    expected = [greedy_continuation(model, arrival.prompt, arrival.output_len) for arrival in arrivals]
    assert set(report["modes"]) == {"reference", "fused", "weave"}
    for mode, found in report["modes"].items():
        assert found["generated"] == expected, mode
        assert found["split_passes"] == (0 if mode != "weave" else pytest.approx(found["passes"], abs=8))
        assert found["tokens_per_pass"] <= 16
        ms = found["ms"]
        for latency in ms.values():
            assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"]
        assert ms["first_token"]["p99"] <= ms["whole_request"]["p99"] <= found["seconds"] * 1e3
        num_output = sum(map(len, expected))
        assert found["output_tokens_per_s"] == pytest.approx(num_output / found["seconds"])
        num_prompt = sum(len(arrival.prompt) for arrival in arrivals)
        assert found["all_tokens_per_s"] == pytest.approx((num_output + num_prompt) / found["seconds"])
        # Every request's tokens went through once, except the last of each.
        assert found["tokens_per_pass"] * found["passes"] == pytest.approx(num_prompt + num_output - len(expected))
    assert "6 of 6 requests got the same tokens in all modes." in printed


def test_prefill_latencies_with_a_link_are_called_emulated(over_ranks):
    printed, folder = over_ranks
    report = read(folder, "prefill")
    assert report["emulated_link"] == {"gigabytes_per_s": 0.005, "latency_us": 20.0}
    assert [row["tokens"] for row in report["rows"]] == [24, 64]
    link = EmulatedLink(0.005, 20)
    for row in report["rows"]:
        ms = {mode: times["ms"] for mode, times in row["modes"].items()}
        assert list(ms) == ["reference", "fused", "weave", NO_LINK]
        injected = 5 * link.occupied_us(row["tokens"] * 64 * 4, 2) / 1e3  # two layers have five reductions
        assert row["injected_ms"] == pytest.approx(injected)
        # What sleeps for that long takes at least that long.
        assert min(ms["fused"], ms["reference"]) > injected
        each_ms = {mode: times["each_ms"] for mode, times in row["modes"].items()}
        shares = prefill_bench.hidden_shares(each_ms, injected)
        assert (row["hidden_share"], row["hidden_share_strict"]) == pytest.approx(shares)
        for times in row["modes"].values():
            assert times["ms_p20"] <= times["ms"] <= times["ms_p80"]
        assert row["plan"]["kind"] in ("none", "fuse", "split")
        assert set(row["predicted_us"]) >= {"reference", "fused"}
    title, *_ = re.findall(r"Prefill latency.*", printed)
    assert "2 ranks on cpu" in title and "emulated link of 0.005 GB/s, 20 us" in title
    assert re.search(r"Serving 6 requests, 50 per second.*emulated link", printed)
    assert printed.count("nothing here is the speed of a real link") == 2


def test_pictures_are_drawn(over_ranks):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, folder = over_ranks
    for name in ("prefill.png", "serve.png"):
        picture = pyplot.imread(folder / name)
        assert min(picture.shape[:2]) > 400 and picture.std() > 0.1


def test_only_rank_0_prints(over_ranks):
    printed, folder = over_ranks
    assert printed.count(f"Written: {folder / 'serve.json'}") == 1
    assert len(re.findall(r"30 new tokens after \d+ of prompt in [\d.]+ s: [\d.]+ tokens/s", printed)) == 5


@pytest.mark.parametrize(
    "name, words",
    [
        ("heads", r"UserError: ModelConfig: num_heads must be a multiple of world_size, got num_heads=5, world_size=2"),
        (
            "profile",
            r"UserError: HardwareProfile: profile 'h100' was made on .*, this device is .*",
        ),
        ("output", r"UserError: /proc/x.png: cannot be written: .*"),
        ("one", r"rank 1: no such file here"),
        ("split", r"RankDisagreement: allreduce_rmsnorm_: .*rank \d.*"),
    ],
)
def test_what_is_refused_is_refused_on_all_ranks(over_ranks, name, words):
    _, folder = over_ranks
    said = read(folder, "refusals")[name]
    assert len(said) == 2
    for sentence in said:
        assert re.fullmatch(words, sentence, re.DOTALL), sentence


# --------------------------------------------------------------------------------------------------- ranks that go away


def running_ranks(parent: int) -> dict[int, int]:
    """Process ids by rank of what a torchrun has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            stat, raw = (folder / "stat").read_text(), (folder / "environ").read_bytes()
        except OSError:
            continue
        state, owner = stat.rpartition(")")[2].split()[:2]
        variables = dict(entry.partition("=")[::2] for entry in raw.decode(errors="replace").split("\0"))
        if int(owner) == parent and "RANK" in variables and state != "Z":
            found[int(variables["RANK"])] = int(folder.name)
    return found


def start(command, **more) -> subprocess.Popen:
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(**more),
    )  # fmt: skip


def wait_for_text(process: subprocess.Popen, text: bytes) -> None:
    """Until it has printed that."""
    os.set_blocking(process.stdout.fileno(), False)
    seen, deadline = b"", time.monotonic() + 60
    while text not in seen:
        assert time.monotonic() < deadline and process.poll() is None, seen
        seen += process.stdout.read() or b""
        time.sleep(0.01)
    os.set_blocking(process.stdout.fileno(), True)


ENDLESS = ["--max-new-tokens", "100000", "--mode", "weave", "--split", "half", "Going on"]


def test_a_killed_rank_ends_all_and_is_named(work):
    torchrun = start([*TORCHRUN, "--nproc-per-node=2", *RUNNER, "generate", *work.TINY, *ENDLESS])
    try:
        wait_for_text(torchrun, b"Going on")
        ranks = running_ranks(torchrun.pid)
        assert sorted(ranks) == [0, 1]
        time.sleep(0.3)  # into the middle of it
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        _, errors = torchrun.communicate(timeout=30)
        assert time.monotonic() - begin < 10
        assert torchrun.returncode == 1
        assert f"tokenweave: rank 0: PeerLost: rank 1 (process {ranks[1]}) has ended" in errors.decode()
        assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    finally:
        torchrun.kill()


def test_an_interrupt_ends_all_quietly(work):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *RUNNER, "generate", *work.TINY, *ENDLESS]
    ranks = [start(command, RANK=str(rank), LOCAL_RANK=str(rank), **where) for rank in range(2)]
    try:
        wait_for_text(ranks[0], b"Going on")
        time.sleep(0.3)
        begin = time.monotonic()
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        errors = [rank.communicate(timeout=30)[1].decode() for rank in ranks]
        assert time.monotonic() - begin < 10
        assert [rank.returncode for rank in ranks] == [130, 130]
        assert "Traceback" not in errors[0] + errors[1] and "PeerLost" not in errors[0] + errors[1]
        assert "interrupted" not in errors[1]
    finally:
        for rank in ranks:
            rank.kill()


# ------------------------------------------------------------------------------------------------------ in one process


def test_one_process_needs_no_torchrun(work, tmp_path, capsys, over_ranks):
    for mode in ("reference", "weave"):
        assert runner.main([*work.GENERATE, "--mode", mode, "--json", str(tmp_path / "one.json")]) == 0
        assert tokens_of(read(tmp_path, "one")) == tokens_of(read(over_ranks[1], "fused"))
    assert "1 rank on cpu" in capsys.readouterr().out
    assert runner.main(["generate", *work.TINY, "--max-new-tokens", "10", work.PROMPTS[0]]) == 0
    text = tokens_of(read(tmp_path, "one"))[0]
    assert (work.PROMPTS[0] + ByteTokenizer().decode(text) + "\n") in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "x"], "--model FOLDER is missing; --random takes random weights instead"),
        (["generate", "--model", "/nowhere", "x"], "/nowhere: no such folder."),
        (["generate", "TINY", "--temperature", "-1", "x"], "SamplingParams: temperature must be at least 0, got -1.0"),
        (["generate", "TINY", "--vocab", "300", "x"], "a random model speaks bytes: --vocab must be 256"),
        (["generate", "TINY", "--prompts-file", "/nowhere"], "--prompts-file /nowhere: cannot be read: "),
        (["generate", "TINY", "--prompts-file", os.devnull], "there is no prompt: "),
        (["generate", "TINY", "--max-new-tokens", "2000000", "x"], "the model has 1048576 positions, and 2000000 "),
        (["prefill-bench", "TINY", "--hidden", "60"], "ModelConfig: hidden must be a multiple of 2 * num_heads"),
        (["prefill-bench", "TINY", "--link-gb-s", "1"], "--link-gb-s: only CPU ranks, two or more, can have an"),
        (["prefill-bench", "TINY", "--link-us", "1"], "--link-us needs --link-gb-s: both describe the emulated link"),
        (
            ["prefill-bench", "TINY", "--device", "cpu", "--launch", "graph"],
            "--launch graph: only GPUs have CUDA graphs",
        ),
        (["prefill-bench", "TINY", "--tokens", "8", "8"], "--tokens: each number once, got 8 8"),
        (["prefill-bench", "TINY", "--profile", "/nowhere"], "/nowhere: cannot be read: No such file or directory"),
        (["serve-bench", "TINY", "--chunk", "4", "--slots", "5"], "--chunk must be at least --slots=5, so that all"),
        (["serve-bench", "TINY", "--requests", "1", "--json", "/proc/x.json"], "/proc/x.json: cannot be written: "),
    ],
)
def test_what_a_user_can_put_right_is_a_sentence(work, arguments, words, capsys):
    command, *rest = arguments
    if rest[0] == "TINY":
        rest = [*work.TINY, *rest[1:]]
    assert runner.main([command, *rest]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"tokenweave: {words}"), errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "error, status, words",
    [
        (PeerLost("allreduce_rmsnorm_: rank 1 has ended"), 1, r"tokenweave: rank 0: PeerLost: .*: rank 1 has ended"),
        (RankDisagreement("x"), 1, r"tokenweave: rank 0: RankDisagreement: x"),
        (RuntimeError("gloo: late\nmore"), 1, r"tokenweave: rank 0: CommunicationError: gloo: late"),
        (ZeroDivisionError("ours"), 1, r"tokenweave: rank 0: Traceback .*ZeroDivisionError: ours\s*"),
        (KeyboardInterrupt(), 130, r"tokenweave: interrupted"),
    ],
)
def test_every_way_to_fail_has_its_words(work, error, status, words, capsys, monkeypatch):
    class Fails:
        @staticmethod
        def run(arguments, ranks, reporter):
            raise error

        add_arguments = staticmethod(prefill_bench.add_arguments)

    monkeypatch.setitem(runner.COMMANDS, "prefill-bench", (Fails, ""))
    assert runner.main(["prefill-bench", *work.TINY]) == status
    assert re.fullmatch(words, capsys.readouterr().err.rstrip("\n"), re.DOTALL)


@pytest.mark.parametrize("choice", ["0", "-3", "third"])
def test_a_split_is_one_of_few_things(work, choice, capsys):
    with pytest.raises(SystemExit) as left:
        runner.main(["prefill-bench", *work.TINY, f"--split={choice}"])
    assert left.value.code == 2
    assert "argument --split" in capsys.readouterr().err


def test_random_weights_do_not_depend_on_the_number_of_ranks():
    mixture = ModelConfig(**(vars(CONFIG) | {"num_experts": 4, "experts_per_token": 2, "vocab_size": 101}))
    for config in (CONFIG, mixture, ModelConfig(**(vars(CONFIG) | {"qkv_bias": True}))):
        make = {"seed": 3, "dtype": torch.float32, "device": torch.device("cpu")}
        whole = random_share(config, 0, 1, **make)
        for rank in range(2):
            expected = dict(shard(whole, rank, 2).named_parameters())
            found = dict(random_share(config, rank, 2, **make).named_parameters())
            assert expected.keys() == found.keys()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        another = random_share(config, 0, 1, **(make | {"seed": 4}))
        assert not torch.equal(another.layers[0].self_attn.qkv_proj.weight, whole.layers[0].self_attn.qkv_proj.weight)
        assert not torch.equal(whole.layers[0].self_attn.o_proj.weight, whole.layers[1].self_attn.o_proj.weight)


def test_hidden_shares():
    shares = prefill_bench.hidden_shares
    assert shares({"fused": [20.0], "weave": [14.0], NO_LINK: [12.0]}, 8.0) == (0.75, 0.75)
    assert shares({"fused": [21.0], "weave": [14.0], NO_LINK: [10.0]}, 8.0) == (0.875, 0.5)
    assert shares({"weave": [14.0], NO_LINK: [12.0]}, 8.0) == (None, 0.75)
    assert shares({"fused": [20.0], NO_LINK: [12.0]}, 8.0) == (None, None)
    # A disturbance that lasts for a whole turn disturbs no share.
    assert shares({"fused": [20, 90, 20], "weave": [14, 84, 14], NO_LINK: [12, 82, 80]}, 8.0) == (0.75, 0.75)


def test_a_graph_is_captured_once_and_replayed_for_every_pass(monkeypatch):
    """On any machine: with a capture that replays by running the pass."""
    captures, replays = [], []

    class FakeCapture:
        def __init__(self, executor, batch, plan):
            captures.append(plan)
            self.replay = lambda: (replays.append(batch), executor.forward(batch, plan))[1]

    monkeypatch.setattr(session, "CapturedPass", FakeCapture)
    config = ModelConfig(hidden=32, intermediate=48, num_layers=1, num_heads=4, num_kv_heads=2)
    ranks = SimpleNamespace(group=None, world_size=1)
    planner = Planner(shape_of(config, 4), 1, H100, launch="graph")
    with session.Session(
        ranks, random_decoder(config, 0), planner, ("fused", "weave"), max_tokens=8, num_slots=1, max_len=8
    ) as one:
        batch = prefill_bench.prompt_of(8, 256, 0, torch.device("cpu"))
        for mode in ("fused", "weave"):
            call = one.prefill_call(mode, batch, "graph")
            assert torch.equal(call(), one.prefill(mode, batch))
            assert torch.equal(call(), one.prefill_call(mode, batch, "eager")())
    assert (captures[0], captures[1].launch) == (None, "graph")
    assert len(captures) == 2 and len(replays) == 4
