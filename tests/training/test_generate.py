"""Packed greedy text is what `generate` writes for each adapter through PEFT."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from sweeper import methods
from sweeper.record import ADAPTER
from sweeper.tasks import Encoded
from sweeper.training.export import write_adapter
from sweeper.training.generate import generate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.score import score

# PEFT still asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

NEW = 12
RNG = np.random.default_rng(0)
PROMPTS = [tuple(RNG.integers(3, 280, int(n)).tolist()) for n in (5, 17, 9, 3, 30)]


@pytest.fixture
def adapters(place: Any, make_spec: Any) -> Any:
    """Specs with their ranks for three runs, and strong random weights, so that each run writes a text of its own."""

    def make(base: Any) -> list[Any]:
        made = []
        for seed, (name, rank) in enumerate([("attn", 4), ("ff", 2), ("full", 7)]):
            ranks = dict.fromkeys(place(base, name), rank)
            spec = make_spec(rank=rank, alpha=2 * rank, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            weights = {
                target.name: (
                    0.5 * torch.randn(rank, target.in_features, generator=generator),
                    0.5 * torch.randn(rank, target.out_features, generator=generator),
                )
                for target in ranks
            }
            made.append((spec, ranks, weights))
        return made

    return make


def filled_pack(base: Any, made: list[Any]) -> Pack:
    specs = [methods.adapter(spec, ranks) for spec, ranks, _ in made]
    pack = Pack(base, [adapter.ranks for adapter in specs], PackConfig(batch_size=4))
    for slot, (adapter, (_, _, weights)) in enumerate(zip(specs, made, strict=True)):
        pack.store.assign(slot, adapter)
        with torch.no_grad():
            for name, views in pack.store.views(slot).items():
                for view, value in zip(views, weights[name], strict=True):
                    view.copy_(value)
    return pack


def reference(model: Any, prompt: tuple[int, ...], stops: list[int], new: int = NEW) -> tuple[int, ...]:
    written = model.generate(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new, do_sample=False, eos_token_id=stops or None, pad_token_id=0, use_cache=True,
    )  # fmt: skip
    return tuple(written[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_packed_greedy_text_is_what_generate_writes(kind: str, load: Any, adapters: Any, tmp_path: Path) -> None:
    base = load(kind)
    made = adapters(base)
    models = [base.model]
    for slot, (spec, ranks, weights) in enumerate(made):
        write_adapter(tmp_path / str(slot), spec, list(ranks), weights)
        models.append(PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / str(slot) / ADAPTER))
    free = [[reference(model, prompt, []) for prompt in PROMPTS] for model in models]
    # ids that cut some of the texts short and leave others running to the end
    stops = [free[0][0][4], free[1][1][2], free[2][2][0]]

    with filled_pack(base, made) as pack:
        endless = generate(pack, [-1, 0, 1, 2], PROMPTS, max_new_tokens=NEW, stop_ids=[-7], rows=2)
        stopped = generate(pack, [-1, 0, 1, 2], PROMPTS, max_new_tokens=NEW, stop_ids=stops, rows=3)
    assert [[text.ids for text in texts] for texts in endless] == free
    assert all(text.capped for texts in endless for text in texts)
    assert len({texts[0].ids for texts in endless}) > 2  # the adapters write different texts
    for found, model in zip(stopped, models, strict=True):
        for text, prompt in zip(found, PROMPTS, strict=True):
            wanted = reference(model, prompt, stops)
            ended = wanted[-1] in stops
            assert text.ids == (wanted[:-1] if ended else wanted)
            assert text.capped == (not ended)
    assert {text.capped for texts in stopped for text in texts} == {True, False}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_text_ends_where_the_learned_positions_do(rows: int, load: Any, adapters: Any) -> None:
    """The last position gives one more token, and what is beside a long prompt is written to its end."""
    base = load("gpt2")
    most = base.model.config.n_positions
    long = tuple(RNG.integers(3, 280, most - 4).tolist())
    with filled_pack(base, adapters(base)) as pack:
        found = generate(pack, [-1, 0], [long, PROMPTS[0]], max_new_tokens=NEW, stop_ids=[-7], rows=rows)
        early = generate(pack, [-1], [long], max_new_tokens=NEW, stop_ids=[found[0][0].ids[-1]], rows=rows)
    assert [[len(text.ids) for text in texts] for texts in found] == [[5, NEW]] * 2
    assert all(text.capped for texts in found for text in texts)
    assert found[0][0].ids == reference(base.model, long, [], 5)
    assert found[0][1].ids == reference(base.model, PROMPTS[0], [])
    assert not early[0][0].capped


def test_exact_match_by_teacher_forcing_is_greedy_text_equal_to_the_response(load: Any, adapters: Any) -> None:
    """Responses are the run's own greedy text, half of them with one token changed."""
    base = load("llama")
    with filled_pack(base, adapters(base)) as pack:
        texts = generate(pack, [1], PROMPTS, max_new_tokens=NEW, stop_ids=[-7], rows=5)[0]
        examples, expected = [], []
        for place, (prompt, text) in enumerate(zip(PROMPTS, texts, strict=True)):
            right = text.ids
            wrong = (*right[:place], (right[place] + 1) % 280, *right[place + 1 :])
            for response, matches in ((right, True), (wrong, False)):
                examples.append(Encoded(f"{place}/{matches}", (*prompt, *response), len(prompt)))
                expected.append(matches)
        for budget in (64, 100_000):
            found = score(pack, [0, 1], examples, budget=budget)
            assert [one.exact_match for one in found[1]] == expected
            assert not any(one.exact_match for one in found[0])
