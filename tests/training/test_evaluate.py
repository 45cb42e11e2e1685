"""What a split's score is made of: choices, generated texts, programs, general text; for several adapters at once."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sweeper.spec import DatasetSpec, EvaluationSpec
from sweeper.tasks import Choice, Encoded, EncodedSplit, general_text, metrics
from sweeper.tasks.template import tokenise
from sweeper.training import evaluate as evaluation
from sweeper.training.evaluate import evaluate, evaluate_examples
from sweeper.training.generate import cut, generate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig
from sweeper.training.score import choose, score
from sweeper.untrusted.sandbox import Limits

LIMITS = Limits(wall_seconds=2.0, cpu_seconds=1)
DATASET = DatasetSpec(name="d", family="jsonl", metrics=("exact_match",), max_new_tokens=12, max_length=64)


@pytest.fixture
def pack(tiny_llama: Any) -> Any:
    """No adapter in it: slot -1 is the base model, which is all these tests need."""
    with Pack(tiny_llama, [{}], PackConfig(batch_size=4)) as made:
        yield made


def example(tokenizer: Any, prompt: str, response: str, *, choices: tuple[str, ...] = (), check: str = "") -> Encoded:
    before, after = tokenise("plain", prompt, response, None, tokenizer)
    options = tuple(Choice(text, tuple(tokenise("plain", prompt, text, None, tokenizer)[1][:-1])) for text in choices)
    return Encoded(prompt, (*before, *after), len(before), options, check)


def test_a_choice_is_the_likeliest_by_character(pack: Any) -> None:
    """Against log-likelihoods taken one by one from the model's own logits."""
    base = pack.base
    examples = [
        example(base.tokenizer, f"Question {n}:", "no", choices=("no", "perhaps", "it is so", "yes")) for n in range(5)
    ]
    expected = []
    for one in examples:
        values = []
        for choice in one.choices:
            ids = torch.tensor([[*one.input_ids[: one.prompt_length], *choice.ids]])
            with torch.no_grad():
                log_p = base.model(ids).logits[0, :-1].log_softmax(-1)
            picked = log_p.gather(1, ids[0, 1:, None])[one.prompt_length - 1 :].sum()
            values.append(float(picked) / len(choice.text))
        expected.append(values.index(max(values)))
    for budget in (32, 100_000):
        assert choose(pack, [-1], examples, budget=budget) == [expected]
    dataset = replace(DATASET, metrics=("choice_accuracy", "macro_f1"))
    (found,) = evaluate_examples(pack, [-1], examples, dataset)
    picks = [one.choices[index].text for one, index in zip(examples, expected, strict=True)]
    assert [row["choice"] for row in found.rows] == picks
    assert found.score.metrics["choice_accuracy"] == sum(pick == "no" for pick in picks) / 5
    assert found.score.metrics["macro_f1"] == metrics.macro_f1(picks, ["no"] * 5)
    assert "exact_match" not in found.score.metrics


def test_nll_alone_where_nothing_else_is_wanted(pack: Any) -> None:
    examples = [example(pack.base.tokenizer, f"Q{n}", "a", choices=("a", "b")) for n in range(3)]
    (found,) = evaluate_examples(pack, [-1], examples, None)
    assert found.score.metrics == {}
    assert [set(row) for row in found.rows] == [{"id", "nll", "tokens"}] * 3


@pytest.mark.parametrize(
    ("text", "stops", "found"),
    [
        ("abc", [], ("abc", False)),
        ("abc", ["x"], ("abc", False)),
        ("a\n\nb\ndef", ["\ndef", "\n\n"], ("a", True)),
        ("stop", ["stop"], ("", True)),
    ],
)
def test_text_ends_before_its_first_stop_string(text: str, stops: list[str], found: tuple[str, bool]) -> None:
    assert cut(text, stops) == found


def test_stop_strings_end_generation_early_and_change_nothing_before_them(pack: Any) -> None:
    tokenizer, length = pack.base.tokenizer, 64
    prompts = [tuple(tokenizer(f"prompt number {n}").input_ids) for n in range(4)]
    ends = [tokenizer.eos_token_id]
    free = generate(pack, [-1], prompts, max_new_tokens=length, stop_ids=ends, rows=4)[0]
    texts = [tokenizer.decode(list(one.ids)) for one in free]
    stop = texts[0][6:9]
    held = generate(pack, [-1], prompts, max_new_tokens=length, stop_ids=ends, rows=2, stop_strings=[stop])[0]
    for one, text in zip(held, texts, strict=True):
        written = tokenizer.decode(list(one.ids))
        assert text.startswith(cut(written, [stop])[0])
        assert cut(written, [stop]) == cut(text, [stop])


def test_a_stopped_text_is_not_capped_and_a_cut_off_one_is(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = pack.base.tokenizer

    def written(*arguments: Any, **named: Any) -> Any:
        texts = ("7\nnext", "7 and so on")
        return [[evaluation.Generated(tuple(tokenizer(text).input_ids), True) for text in texts]]

    monkeypatch.setattr(evaluation, "generate", written)
    dataset = replace(DATASET, metrics=("final_number", "bleu", "rouge_l"), options={"stop": ["\n"]})
    examples = [example(tokenizer, "a", "7"), example(tokenizer, "b", "8")]
    (found,) = evaluate_examples(pack, [-1], examples, dataset, generation=True)
    assert [(row["text"], row["capped"], row["final_number"]) for row in found.rows] == [
        ("7", False, 1.0),
        ("7 and so on", True, 0.0),
    ]
    assert found.score.metrics["capped"] == found.score.metrics["final_number"] == 0.5
    assert found.score.metrics["bleu"] == metrics.bleu(["7", "7 and so on"], ["7", "8"])
    assert {"sentence_bleu", "rouge_l"} <= set(found.rows[0])
    (without,) = evaluate_examples(pack, [-1], examples, dataset, generation=False)
    assert without.score.metrics == {}


def test_programs_are_run(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeper.untrusted import sandbox

    try:
        sandbox.ready()
    except sandbox.SandboxError as error:
        pytest.skip(str(error))
    tokenizer = pack.base.tokenizer

    def written(*arguments: Any, **named: Any) -> Any:
        texts = ("```python\ndef f(): return 1\n```", "def f(): return 2", "while True: pass")
        return [[evaluation.Generated(tuple(tokenizer(text).input_ids), False) for text in texts]]

    monkeypatch.setattr(evaluation, "generate", written)
    monkeypatch.setattr(sandbox, "Limits", lambda: LIMITS)
    examples = [example(tokenizer, n, "x", check="exec(PROGRAM, globals())\nassert f() == 1") for n in ("a", "b", "c")]
    dataset = replace(DATASET, metrics=("pass_at_1",))
    (found,) = evaluate_examples(pack, [-1], examples, dataset, generation=True)
    assert [row["pass_at_1"] for row in found.rows] == [1.0, 0.0, 0.0]
    assert found.rows[1]["outcome"] == "AssertionError"
    assert found.score.metrics["pass_at_1"] == pytest.approx(1 / 3)


def test_general_text_is_a_split_of_every_run(pack: Any) -> None:
    run: Any = SimpleNamespace(
        spec=SimpleNamespace(dataset=DATASET, evaluation=EvaluationSpec(name="e", splits=("test", "general_text"))),
        splits={"test": EncodedSplit((example(pack.base.tokenizer, "a", "b"),))},
    )
    (found,) = evaluate(pack, [-1], run, general_text.SPLIT)
    assert found.score.metrics == {}
    assert found.score.examples == len(general_text.passages()) >= 25
    # a byte-level tokenizer and a random model of 512 tokens: about log(512) nats a token
    assert found.score.nll == pytest.approx(math.log(512), rel=0.1)
    (own,) = evaluate(pack, [-1], run, "test")
    assert set(own.score.metrics) == {"exact_match"}


def test_general_text_is_the_pinned_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sweeper.errors import DataError

    for first, rest in general_text.passages():
        assert first
        assert rest
        assert "Gutenberg" not in first + rest
        assert len(first) + len(rest) < 1700
    monkeypatch.setattr(general_text, "folder", lambda name: tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "in_the_year_2889.txt").write_text("another text")
    with pytest.raises(DataError, match=r"has another text \(SHA-256 .*\); install reasoning-gym==0.1.25"):
        general_text.check()
    monkeypatch.setattr(general_text, "is_installed", lambda name: False)
    with pytest.raises(DataError, match=r"needs the text in the package reasoning-gym: lora-atlas fetch reasoning-gym"):
        general_text.check()


def test_scores_of_choices_do_not_depend_on_what_is_scored_with_them(pack: Any) -> None:
    examples = [example(pack.base.tokenizer, "q" * n, "r" * (8 - n)) for n in range(1, 8)]
    alone = [score(pack, [-1], [one], budget=8)[0][0].nll for one in examples]
    assert [one.nll for one in score(pack, [-1], examples, budget=10_000)[0]] == pytest.approx(alone, rel=1e-5)
