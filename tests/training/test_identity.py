"""A fresh adapter is the identity."""

from typing import Any

import pytest
import torch

from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.score import score

KINDS = ["llama", "gpt2", "gpt_neox", "qwen2", "phi3", "gemma2", "gemma3_text", "granite", "opt", "bloom", "falcon"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_identity(kind: str, load: Any, make_adapter: Any, make_examples: Any) -> None:
    base, examples = load(kind), make_examples(0, count=6)
    adapters = [
        make_adapter(base, "full", 4),
        make_adapter(base, "attn", 8, seed=1, dropout=0.5),
        make_adapter(base, "ends", 2, embeddings=True, head=True),
    ]
    with Pack(base, [adapter.ranks for adapter in adapters], PackConfig(batch_size=4)) as pack:
        for slot, adapter in enumerate(adapters):
            pack.store.assign(slot, adapter)
        found = score(pack, [-1, 0, 1, 2], examples, budget=4096)
    for i, example in enumerate(examples):
        ids = torch.tensor([example.input_ids])
        with torch.no_grad():
            log_p = base.model(input_ids=ids).logits[0].log_softmax(-1)
        targets = ids[0, example.prompt_length :]
        nll = -log_p[example.prompt_length - 1 : -1].gather(1, targets[:, None]).sum()
        for scores in found:
            assert scores[i].nll == pytest.approx(float(nll), rel=1e-5)
            assert scores[i].tokens == len(targets)
            assert scores[i].position == i


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_trained_adapter_is_not(kind: str, load: Any, make_job: Any, make_adapter: Any, make_examples: Any) -> None:
    """And the bare base model, scored beside it, is what it was."""
    base, examples = load(kind), make_examples(0, count=6)
    adapter = make_adapter(base, "full", 4)
    with Pack(base, [adapter.ranks], PackConfig(batch_size=4)) as pack:
        pack.add(make_job("x", adapter, examples, steps=4))
        before = score(pack, [-1, 0], examples, budget=4096)
        for _ in range(4):
            pack.step()
        after = score(pack, [-1, 0], examples, budget=4096)
    assert after[0] == before[0]
    assert sum(s.nll for s in after[1]) < sum(s.nll for s in before[1]) - 0.1
