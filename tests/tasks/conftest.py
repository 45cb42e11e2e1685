"""A tokenizer of words, digits and bytes built in code, with and without a chat template."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CHAT = (
    "{% for m in messages %}{{ '<start>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant\n' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT


@pytest.fixture
def make_tokenizer() -> Callable[..., Any]:
    """A byte-level tokenizer; `starts` puts `<s>` before every text, as Llama's does."""

    def make(chat_template: str | None = CHAT, *, starts: bool = False, ends: str | None = "<end>") -> Any:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
        from transformers import PreTrainedTokenizerFast

        special = ["<s>", "<start>", "<end>"]
        symbols = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        core = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(special)
        if starts:
            core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=ends)
        tokenizer.chat_template = chat_template
        return tokenizer

    return make


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows (or raw lines) to a file and gives its path."""

    def write(*rows: dict[str, Any] | str, name: str = "my.jsonl") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write
