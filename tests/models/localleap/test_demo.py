"""`tokenweave localleap demo`: its training, its counting, and what it claims about LocalLeap, on the demo's own model.

Another machine rounds differently and trains a slightly different model, so the bounds leave room.
"""

import argparse
import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tokenweave_models.common.errors import UserError
from tokenweave_models.localleap.demo import demo, evaluation, training
from tokenweave_models.localleap.demo.evaluation import BLOCK_LENGTH, Result, Setting, local_leap, threshold, topk
from tokenweave_models.localleap.demo.lexicon import ANSWER_LENGTH, MASK_ID, PROMPT_LENGTH, PROMPT_SETS
from tokenweave_models.localleap.demo.training import Recipe

RECIPE = Recipe()
FEW_STEPS = Recipe(steps=6, batch=(("main", 4), ("far", 2)))
NUM_PROMPTS = 32


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    training.keep(training.train(RECIPE), RECIPE, folder)
    return training.load_trained(RECIPE, folder)


@pytest.fixture(scope="session")
def lexicon():
    return training.lexicon_of(RECIPE)


@pytest.fixture(scope="session")
def result_of(model, lexicon):
    """(prompt set, setting) -> Result, each decoded once."""
    known = {}

    def find(name, setting):
        if (name, setting) not in known:
            known[name, setting] = evaluation.evaluate(model, lexicon, name, NUM_PROMPTS, setting)
        return known[name, setting]

    return find


# ----------------------------------------------------------------------------------------------- what the demo claims


def test_targets_are_met(result_of):
    settings = (threshold(0.9), local_leap(), local_leap(radius=0))
    results = {("main", setting): result_of("main", setting) for setting in settings}
    targets = demo.targets_of(results)
    assert len(targets) == 3
    assert all(target.is_met for target in targets), targets
    # The claims mean something only of a model that has learned the task.
    assert results["main", threshold(0.9)].words_right > 0.9


def test_a_window_of_nothing_is_the_threshold(result_of):
    for name in PROMPT_SETS:
        plain, leap = result_of(name, threshold(0.9)), result_of(name, local_leap(radius=0))
        assert (leap.passes, leap.words_right, leap.answers_right) == (
            plain.passes,
            plain.words_right,
            plain.answers_right,
        )


def test_wider_windows_need_fewer_passes(result_of):
    passes = [result_of("main", local_leap(radius=radius)).passes for radius in (0, 1, 2, 4)]
    assert passes == sorted(passes, reverse=True)
    assert passes[1] < passes[0] and passes[2] < passes[1]


def test_in_the_control_there_is_less_to_gain(result_of):
    saved = {
        name: 1 - result_of(name, local_leap()).passes / result_of(name, threshold(0.9)).passes
        for name in ("main", "control")
    }
    assert saved["control"] < 0.7 * saved["main"]


# How well hard words are learned varies from machine to machine more than anything else, and how many are right when
# each letter waits for the one before it with it; so that has no bound here. What parallel decoding does to them has.


def test_far_from_anchors_leaping_is_safe_and_slow_and_a_global_threshold_neither(result_of):
    careful, leap, careless = (result_of("far", s) for s in (threshold(0.9), local_leap(), threshold(0.75)))
    assert leap.words_right >= careful.words_right - 0.02
    assert leap.passes >= 0.8 * careful.passes
    assert careless.passes <= 0.5 * careful.passes
    assert careless.words_right <= min(0.6, careful.words_right)


def test_near_anchors_leaping_is_as_wrong_as_a_global_threshold(result_of):
    careful, leap = (result_of("near", s) for s in (threshold(0.9), local_leap()))
    assert leap.passes <= 0.5 * careful.passes
    assert leap.words_right <= min(0.6, careful.words_right)


def test_letters_taken_four_at_a_time_do_not_fit_together(result_of):
    one, four = result_of("main", topk(1)), result_of("main", topk(4))
    assert (one.passes, four.passes) == (ANSWER_LENGTH, ANSWER_LENGTH / 4)
    assert four.free_right <= one.free_right - 0.2


# ------------------------------------------------------------------------------------------------------------- counting


def test_counting_by_hand(model, lexicon):
    prompts = evaluation.prompts_of(lexicon, "main", 2)
    found = evaluation.evaluate(model, lexicon, "main", 2, threshold(0.75))
    right, free, passes = [], [], 0
    for prompt in prompts:
        tokens = torch.cat((prompt, torch.full((ANSWER_LENGTH,), MASK_ID)))
        for begin in range(PROMPT_LENGTH, len(tokens), BLOCK_LENGTH):
            block = slice(begin, begin + BLOCK_LENGTH)
            while (tokens[block] == MASK_ID).any():
                with torch.no_grad():
                    logits = model(tokens[None])[0, block]
                confidence = logits.softmax(dim=1)
                confidence[:, MASK_ID] = 0
                best, candidates = confidence.max(dim=1)
                best[tokens[block] != MASK_ID] = -1
                chosen = best >= 0.75
                chosen[best.argmax()] = True
                tokens[block] = torch.where(chosen, candidates, tokens[block])
                passes += 1
        verdict = lexicon.judge(prompt[None], tokens[None, PROMPT_LENGTH:])
        right.append(verdict.right[0])
        free.append(verdict.free[0])
    right, free = torch.stack(right), torch.stack(free)
    assert found.passes == passes / 2
    assert found.tokens_per_pass == pytest.approx(2 * ANSWER_LENGTH / passes)
    assert found.words_right == pytest.approx(right.double().mean().item())
    assert found.answers_right == pytest.approx(right.all(dim=1).double().mean().item())
    assert found.free_right == pytest.approx(right[free].double().mean().item())
    assert found.model_s > 0 and found.selector_s > 0


def test_the_first_block_pass_by_pass(model, lexicon):
    prompt = evaluation.prompts_of(lexicon, "main", 1)[0]
    states = evaluation.first_block_by_pass(model, prompt, topk(4))
    assert [state.count(".") for state in states] == [20, 16, 12, 8, 4, 0]
    assert {len(state) for state in states} == {BLOCK_LENGTH}
    for before, after in pairwise(states):
        assert all(old in (".", new) for old, new in zip(before, after, strict=True))


def made_up(passes, words_right, setting=None):
    return Result("main", setting or topk(), 1, words_right, 0.0, None, passes, ANSWER_LENGTH / passes, 0.0, 0.0)


def test_area_under_the_curve():
    assert evaluation.area_under_curve([made_up(1.0, 1.0)]) == 1.0
    assert evaluation.area_under_curve([made_up(ANSWER_LENGTH, 0.5)]) == pytest.approx(0.5 / ANSWER_LENGTH)
    # Budgets 1 to 12 have nothing, 13 to 24 a half, 25 to 48 the better of both; more passes at less are no loss.
    curve = [made_up(12.5, 0.5), made_up(24.5, 0.9), made_up(40.0, 0.1)]
    assert evaluation.area_under_curve(curve) == pytest.approx((12 * 0.5 + 24 * 0.9) / 48)


@pytest.mark.parametrize(
    "leap, no_window, met",
    [
        ((27.9, 0.991), (40.0, 1.0), [True, True, True]),
        ((28.1, 0.991), (40.0, 1.0), [False, True, True]),
        ((20.0, 0.989), (40.0, 1.0), [True, False, True]),
        ((20.0, 1.0), (39.99, 1.0), [True, True, False]),
    ],
)
def test_targets(leap, no_window, met):
    results = {
        ("main", threshold(0.9)): made_up(40.0, 1.0),
        ("main", local_leap()): made_up(*leap),
        ("main", local_leap(radius=0)): made_up(*no_window),
    }
    assert [target.is_met for target in demo.targets_of(results)] == met


# ------------------------------------------------------------------------------------------------------------- training


def test_the_loss_is_lladas():
    model, lexicon = training.untrained_model(RECIPE), training.lexicon_of(RECIPE)
    prompts, answers = lexicon.draw("main", 3, torch.Generator().manual_seed(0))
    share = torch.tensor([0.2, 0.5, 1.0])
    masked = torch.rand(answers.shape, generator=torch.Generator().manual_seed(1)) < share[:, None]
    total = 0.0
    for row in range(3):
        logits = model(torch.cat((prompts[row], answers[row].masked_fill(masked[row], MASK_ID)))[None])[0]
        nats = F.cross_entropy(logits[PROMPT_LENGTH:], answers[row], reduction="none")
        total += nats[masked[row]].sum().item() / share[row].item()
    loss = training.masked_loss(model, prompts, answers, masked, share)
    assert loss.item() == pytest.approx(total / (3 * ANSWER_LENGTH), rel=1e-5)


def test_training_is_the_same_every_time_and_with_any_threads():
    losses = []
    before = torch.get_num_threads()
    try:
        models = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            models.append(training.train(FEW_STEPS, losses.append))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert losses[:6] == losses[6:]
    for first, second in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(first, second)
    other = training.train(replace(FEW_STEPS, seed=1))
    assert not torch.equal(other.norm.weight, models[0].norm.weight)


def test_weights_are_kept_by_recipe_torch_and_source(tmp_path, monkeypatch):
    trained = training.train(FEW_STEPS)
    assert training.load_trained(FEW_STEPS, tmp_path) is None
    training.keep(trained, FEW_STEPS, tmp_path / "deep" / "er")
    folder = tmp_path / "deep" / "er"
    kept = training.load_trained(FEW_STEPS, folder)
    for name, weight in trained.state_dict().items():
        assert torch.equal(kept.state_dict()[name], weight)
    assert [path.name for path in folder.iterdir()] == [training.weights_file(FEW_STEPS, folder).name]
    assert training.load_trained(replace(FEW_STEPS, learning_rate=1e-3), folder) is None

    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        assert training.load_trained(FEW_STEPS, folder) is None
    other_source = tmp_path / "words.py"
    other_source.write_text("another language")
    with monkeypatch.context() as patch:
        patch.setattr(training.words, "__file__", str(other_source))
        assert training.load_trained(FEW_STEPS, folder) is None

    path = training.weights_file(FEW_STEPS, folder)
    path.write_bytes(path.read_bytes()[:100])
    assert training.load_trained(FEW_STEPS, folder) is None


def test_a_kept_model_is_not_trained_again(tmp_path, monkeypatch, capsys):
    model, seconds = demo.trained_model(FEW_STEPS, tmp_path, retrain=False)
    assert seconds > 0
    again, no_seconds = demo.trained_model(FEW_STEPS, tmp_path, retrain=False)
    assert no_seconds is None
    assert torch.equal(again.norm.weight, model.norm.weight)
    calls = []
    monkeypatch.setattr(training, "train", lambda recipe, on_step: calls.append(recipe) or model)
    assert demo.trained_model(FEW_STEPS, tmp_path, retrain=True)[1] is not None
    assert calls == [FEW_STEPS]
    # A folder that cannot be: the demo goes on without.
    (tmp_path / "file").write_text("")
    demo.trained_model(FEW_STEPS, tmp_path / "file", retrain=False)
    assert "not kept" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------- the demo


def options(*arguments):
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args([str(argument) for argument in arguments])


def test_every_policy_is_decoded():
    from tokenweave_ops import POLICIES

    wanted = demo.settings_by_set()
    assert {setting.policy for setting in wanted["main"]} == set(POLICIES)
    for name in PROMPT_SETS:
        assert len(set(wanted[name])) == len(wanted[name])
        for sweep in demo.SWEEPS.values():
            assert set(sweep) <= set(wanted[name])


def test_the_whole_demo(model, tmp_path, monkeypatch, capsys):
    """As the command runs it, with fewer settings, on weights that were kept."""
    monkeypatch.setattr(demo, "Recipe", lambda: RECIPE)
    training.keep(model, RECIPE, tmp_path / "cache")
    monkeypatch.setattr(demo, "SWEEPS", {name: list(sweep)[:2] for name, sweep in demo.SWEEPS.items()})
    monkeypatch.setattr(demo, "POLICY_SETTINGS", (*demo.OTHER_SETTINGS, local_leap(radius=0), Setting("klass", 0.6)))
    png, file = tmp_path / "new" / "plot.png", tmp_path / "new" / "rows.json"
    demo.run(options("--prompts", 32, "--cache-folder", tmp_path / "cache", "--png", png, "--json", file))
    out = capsys.readouterr().out
    for words in ("Model: ", "One block, pass by pass", "main: ", "control: ", "far: ", "near: ", "klass 0.6", "met: "):
        assert words in out
    assert "MISSED" not in out
    assert png.read_bytes().startswith(b"\x89PNG")
    content = json.loads(file.read_text())
    assert content["recipe"]["steps"] == RECIPE.steps
    assert content["training_s"] is None
    assert len(content["targets"]) == 3
    rows = {(row["prompt_set"], row["policy"]): row for row in content["rows"]}
    assert len(rows) == len(content["rows"]) == sum(map(len, demo.settings_by_set().values()))
    assert rows["main", "threshold 0.9"]["num_prompts"] == 32
    assert rows["far", "threshold 0.9"]["num_prompts"] == 8
    assert rows["main", "topk, 1 a pass"]["passes"] == ANSWER_LENGTH
    assert f"{rows['main', 'threshold 0.9']['passes']:.2f}" in out
    assert set(content["areas"]["main"]) == set(demo.SWEEPS)


def test_a_missed_target_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(demo, "decode_all", lambda *_: dict.fromkeys(keys(), made_up(40.0, 1.0)))
    monkeypatch.setattr(demo, "print_steps", lambda *_: None)

    def keys():
        return [(name, setting) for name, settings in demo.settings_by_set().items() for setting in settings]

    with pytest.raises(UserError, match="a target was missed"):
        demo.report(None, RECIPE, None, 1)
    assert "MISSED: passes of local_leap W 4 over those of threshold 0.9: 1.000, at most 0.7" in capsys.readouterr().out


def test_files_that_cannot_be_written_are_known_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="plot.png: cannot be written"):
        demo.run(options("--png", tmp_path / "file" / "plot.png"))
    with pytest.raises(UserError, match="cannot be written"):
        demo.run(options("--png", tmp_path / "plot.png", "--json", tmp_path))
