"""The demo's model: a small masked diffusion language model, trained as LLaDA was, and kept for the next time."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from tokenweave_models.common.errors import UserError
from tokenweave_models.localleap.config import ModelConfig
from tokenweave_models.localleap.demo import lexicon as words
from tokenweave_models.localleap.demo.lexicon import ANSWER_LENGTH, EOS_ID, MASK_ID, PROMPT_LENGTH, Lexicon
from tokenweave_models.localleap.model import DiffusionModel, random_model

OnStep = Callable[[float], None]


@dataclass(frozen=True)
class Recipe:
    """All that decides the weights, beside torch's version and the machine's arithmetic.

    Attributes:
        smudged_share: of the tokens that may be smudged. With 0.18 a well-trained model is sure of a determined letter
            to 0.82 + 0.18 / 26 = 0.83, midway between LocalLeap's relaxed threshold and that of its anchors.
        batch: prompts per step from each set of lexicon.PROMPT_SETS.
        least_masked: of an answer, as a share. Loss divided by less is noise.
        embedding_scale: of the random embeddings; at 1, training starts from a strong opinion about every token.
    """

    hidden: int = 64
    intermediate: int = 128
    num_layers: int = 2
    num_heads: int = 2
    smudged_share: float = 0.18
    batch: tuple[tuple[str, int], ...] = (("main", 20), ("control", 8), ("far", 12), ("near", 8))
    steps: int = 800
    warm_up_steps: int = 20
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    least_masked: float = 0.05
    embedding_scale: float = 0.3
    lexicon_seed: int = 0
    seed: int = 0


def lexicon_of(recipe: Recipe) -> Lexicon:
    return Lexicon(recipe.lexicon_seed, recipe.smudged_share)


def untrained_model(recipe: Recipe) -> DiffusionModel:
    length = PROMPT_LENGTH + ANSWER_LENGTH
    config = ModelConfig(
        hidden=recipe.hidden,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_heads,
        head_dim=recipe.hidden // recipe.num_heads,
        intermediate=recipe.intermediate,
        vocab_size=lexicon_of(recipe).vocab_size,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        qkv_bias=False,
        shifted=False,
        mask_id=MASK_ID,
        eos_id=EOS_ID,
        max_positions=length,
        learned_positions=length,
    )
    model = random_model(config, recipe.seed)
    with torch.no_grad():
        for embedding in (model.embed_tokens, model.embed_positions):
            embedding.weight.mul_(recipe.embedding_scale)
    return model


def masked_loss(model: DiffusionModel, prompts: Tensor, answers: Tensor, masked: Tensor, share: Tensor) -> Tensor:
    """LLaDA's objective (arXiv 2502.09992, algorithm 1): the cross-entropy of masked tokens, in nats, divided by the
    share of tokens that were to be masked, as a mean over all tokens of the answers. Prompts are never masked.

    Args:
        masked: [batch, ANSWER_LENGTH] bool.
        share: [batch], the probability with which each token of a sequence was masked.
    """
    tokens = torch.cat((prompts, answers.masked_fill(masked, MASK_ID)), dim=1)
    hidden = model.hidden_states(tokens)[:, PROMPT_LENGTH:]
    nats = F.cross_entropy(model.logits(hidden[masked]), answers[masked], reduction="none")
    return (nats / share[:, None].expand_as(masked)[masked]).sum() / masked.numel()


@contextmanager
def one_thread() -> Iterator[None]:
    """What the demo prints must not depend on the number of cores, and so small a model hardly uses a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(recipe: Recipe, on_step: OnStep = lambda loss: None) -> DiffusionModel:
    """The same weights every time on one machine. on_step is given the loss of each step."""
    lexicon, model = lexicon_of(recipe), untrained_model(recipe)
    generator = Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )

    def rate(step: int) -> float:  # linear warm-up, then a cosine down to zero
        return min(1.0, (step + 1) / recipe.warm_up_steps) * (1 + math.cos(math.pi * step / recipe.steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with one_thread():
        for _ in range(recipe.steps):
            drawn = [lexicon.draw(name, count, generator) for name, count in recipe.batch]
            prompts, answers = (torch.cat(parts) for parts in zip(*drawn, strict=True))
            # One share from each of equal strata, so that batches are alike.
            places = torch.randperm(len(prompts), generator=generator) + torch.rand(len(prompts), generator=generator)
            share = recipe.least_masked + (1 - recipe.least_masked) * places / len(prompts)
            masked = torch.rand(answers.shape, generator=generator) < share[:, None]
            loss = masked_loss(model, prompts, answers, masked, share)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            on_step(loss.item())
    return model.eval()


# ---------------------------------------------------------------------------------------------------------------- cache


def default_cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenweave"


def weights_file(recipe: Recipe, folder: Path) -> Path:
    """Where the weights of a recipe are kept. Another torch trains others, and so does another language or loop."""
    digest = hashlib.sha256(json.dumps([asdict(recipe), torch.__version__]).encode())
    for source in (words.__file__, __file__):
        digest.update(Path(source).read_bytes())
    return folder / f"localleap-demo-{digest.hexdigest()[:16]}.safetensors"


def load_trained(recipe: Recipe, folder: Path) -> DiffusionModel | None:
    """The model as it was trained before, or None if it was not, or its file cannot be used."""
    safetensors = _safetensors()
    path = weights_file(recipe, folder)
    try:
        state = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError):
        return None
    model = untrained_model(recipe)
    model.load_state_dict(state)
    return model.eval()


def keep(model: DiffusionModel, recipe: Recipe, folder: Path) -> None:
    """For the next ``load_trained``.

    Raises:
        UserError: the folder cannot be written.
    """
    path = weights_file(recipe, folder)
    half = path.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _safetensors().torch.save_file(model.state_dict(), half)
        half.replace(path)  # so that nobody finds a half-written file
    except OSError as error:
        raise UserError(f"{folder}: the trained weights cannot be kept here: {error}") from error


def _safetensors():
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError("safetensors is not installed; run: pip install 'tokenweave-ops[models]'") from error
    return safetensors
