"""Scores saved adapters with EleutherAI's lm-evaluation-harness (package lm-eval, through its Python API).

The base model is loaded as usual, the adapter by stock PEFT. Tokenisation, batching and metrics are lm-eval's, so the
numbers compare with published ones. One of our datasets becomes an lm-eval task (`as_task`); lm-eval's own tasks are
named by `evaluation.options.tasks`, with `include_path` for local task files.
"""

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeper import installation
from sweeper.errors import DataError, SpecError, unknown
from sweeper.spec import DatasetSpec, EvaluationSpec
from sweeper.tasks import metrics, stop_strings
from sweeper.tasks.example import Example
from sweeper.tasks.package import is_installed
from sweeper.tasks.template import TEMPLATES, adds_start

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "lm_eval"
OPTIONS = {
    "tasks": "names of lm-eval's own tasks, besides dataset",
    "include_path": "folder of your own task files",
    "limit": "examples of each of lm-eval's own tasks; null is all",
    "batch_size": "sequences in a batch (8)",
}


def check(evaluation: EvaluationSpec) -> None:
    """Raises SpecError if lm-eval is not installed or an option does not exist."""
    for option in evaluation.options:
        if option not in OPTIONS:
            raise SpecError(unknown("evaluation.options", option, OPTIONS))
    if not is_installed("lm_eval"):
        raise SpecError(f"evaluation=lm_eval needs the Python package lm-eval: {installation.install('lm_eval')}")


def as_task(spec: DatasetSpec, examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase") -> Mapping[str, Any]:
    """The configuration of an lm-eval task with these examples.

    Examples with choices become `multiple_choice`, scored by `acc` and `acc_norm` (our `choice_accuracy`). Others
    become `generate_until`, scored by our `exact_match`.

    Raises:
        SpecError: the dataset is scored by running programs, which lm-eval would do without a sandbox.
    """
    if metrics.PROGRAM & set(spec.metrics):
        raise SpecError(f"dataset={spec.name} is scored by running programs: evaluation=default does that in a sandbox")
    docs = [_document(spec, example, tokenizer) for example in examples]
    task: dict[str, Any] = {
        "task": f"sweeper_{spec.name}",
        "custom_dataset": lambda **_: {"test": _table(docs)},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": lambda doc: doc["context"],
        "target_delimiter": "",  # it applies to all documents, but their endings differ
    }
    if all(example.choices for example in examples):
        return task | {
            "output_type": "multiple_choice",
            "doc_to_text": _open_for_choices,
            "doc_to_choice": lambda doc: doc["choices"],
            "doc_to_target": lambda doc: doc["choices"].index(doc["response"]),
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        }
    return task | {
        "output_type": "generate_until",
        "doc_to_target": lambda doc: doc["response"],
        "process_results": lambda doc, found: {"exact_match": metrics.exact_match(found[0], doc["response"])},
        "generation_kwargs": {
            "until": list(stop_strings(spec)),
            "max_gen_toks": spec.max_new_tokens or 32,
            "do_sample": False,
        },
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }


def score(
    model: Any, tokenizer: "PreTrainedTokenizerBase", tasks: Sequence[Mapping[str, Any] | str],
    options: Mapping[str, Any],
) -> dict[str, dict[str, float]]:  # fmt: skip
    """lm-eval's metrics by task and by name (`acc_norm`, ...).

    Args:
        model: a transformers model or a PEFT model around one.
        tasks: configurations from `as_task`, or names of lm-eval's own tasks.

    Raises:
        SpecError: lm-eval does not know a task.
    """
    names = [task for task in tasks if isinstance(task, str)]
    with _quiet():
        harness: Any = importlib.import_module("lm_eval")
        api, manager = importlib.import_module("lm_eval.api.task"), importlib.import_module("lm_eval.tasks")
        wrapper = importlib.import_module("lm_eval.models.huggingface")
        known = manager.TaskManager(include_path=options.get("include_path"), include_defaults=bool(names))
        for name in names:
            if name not in known.all_tasks:
                raise SpecError(f"evaluation.options.tasks={name}: lm-eval has no such task, nor has include_path")
        wrapped = wrapper.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=int(options.get("batch_size") or 8),
            add_bos_token=adds_start(tokenizer),
        )  # fmt: skip
        ours = [api.ConfigurableTask(config=dict(task)) for task in tasks if not isinstance(task, str)]
        found: dict[str, Mapping[str, Any]] = {}
        for asked, limit in ((ours, None), (names, options.get("limit"))):  # the limit applies to lm-eval's tasks only
            if asked:
                found |= harness.simple_evaluate(
                    model=wrapped, tasks=asked, task_manager=known, limit=limit, bootstrap_iters=0, log_samples=False
                )["results"]
    return {
        task.removeprefix("sweeper_"): {
            name.split(",")[0]: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and "stderr" not in name and "," in name
        }
        for task, values in found.items()
    }


def _document(spec: DatasetSpec, example: Example, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    if example.turns or not example.prompt:
        raise DataError(f"dataset={spec.name}: lm-eval scores prompts and responses, not conversations or running text")
    context, _ = TEMPLATES[spec.template](example.prompt, spec.system, tokenizer)
    return {"context": context, "choices": list(example.choices), "response": example.response}


def _open_for_choices(doc: Mapping[str, Any]) -> str:
    """The context, ending with a space if neither it nor the choices provide white space (`template.tokenise`).

    lm-eval moves that space to the choice when it tokenises, but does not count it in the length for `acc_norm`.
    """
    opened = doc["context"][-1:].isspace() or all(choice[:1].isspace() for choice in doc["choices"])
    return str(doc["context"]) if opened else f"{doc['context']} "


def _table(docs: list[dict[str, Any]]) -> Any:
    return importlib.import_module("datasets").Dataset.from_list(docs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's progress bars and logs."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
