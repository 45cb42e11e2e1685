"""The zoo of tiny models: every type is in it, and what a fault does to one can be seen."""

import pytest
import torch

from benchmarks import tiny_models

# of every kind
SOME = [
    *("bloom", "bart", "bert", "deepseek_v3", "doge", "falcon (alibi)", "gemma3", "gemma4_text (experts)", "gpt2"),
    *("jamba", "llama4_text", "lfm2", "mamba", "minicpm3", "mixtral", "opt (projections, norm after)", "qwen3_next"),
    *("phi3 (longrope)", "recurrent_gemma", "reformer", "rwkv", "xlstm", "zamba2"),
]


def log_probabilities(name: str, ids: torch.Tensor, *, seed: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return tiny_models.build(name, seed=seed)(input_ids=ids).logits.log_softmax(-1)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SOME)
def test_a_models_context_matters_and_nothing_overflows(name: str) -> None:
    if name not in tiny_models.names():
        pytest.skip("a type that this transformers does not have")
    ids = tokens()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([ids[:, order], ids[:, -1:]], dim=1)
    found, other = log_probabilities(name, ids), log_probabilities(name, shuffled)
    assert torch.isfinite(found).all()
    assert (found - other)[0, -1].abs().mean() > 0.1
    torch.testing.assert_close(found, log_probabilities(name, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["bert", "bert (encoder)", "gemma3_text", "gemma3_text (bidirectional)", "xlm (masked)"]
)
def test_a_row_that_sees_ahead_is_refused_for_it(name: str) -> None:
    ids = tokens()
    changed = torch.cat([ids[:, :12], tokens(1)[:, 12:]], dim=1)
    moved = (log_probabilities(name, ids) - log_probabilities(name, changed))[:, :12].abs().max()
    assert (moved > 0.01) == (tiny_models.refusal(name) is not None)


def test_the_state_of_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    assert not torch.equal(log_probabilities("llama", tokens()), log_probabilities("llama", tokens(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny_models.names())
def test_every_type_can_be_built_or_says_why_not(name: str) -> None:
    assert tiny_models.kind(name)
    try:
        model = tiny_models.outline(name)
    except Exception:
        assert tiny_models.refusal(name)
        return
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
