"""A base model is proved before it is trained: the engine's way through it must give the stock model's numbers.

The stock model is given each of a few short rows alone and unpadded. Against that stand the same rows padded in one
batch, as they are trained on, and grown token by token through the cache, as text is generated. What rounding explains
is measured: the stock model against itself, at other batch shapes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sweeper import lost
from sweeper.cache import cache_folder
from sweeper.errors import ModelError, gist
from sweeper.models.files import local_files, quiet
from sweeper.models.verdict import HeadForm, Padding, Verdict
from sweeper.record import read_sealed, write_sealed
from sweeper.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 4
"""Raise whenever a model could be judged otherwise, so that no verdict of before is read."""
LENGTHS = (21, 14, 8)  # tokens of the rows that are compared
AHEAD = 11  # tokens of the longest one that must be what they are without the rest
GROWN = 2  # tokens that each of them is grown by, one at a time
ROUNDING = 8.0  # times the rounding that was measured is still rounding
ULPS = {"float32": 64, "float16": 8, "bfloat16": 4}
"""And so are so many units in the last place of the largest log-probability."""
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, AssertionError)
"""What a model's own code raises where it is not made for what it is given."""
MOST_ROUNDING = {"float32": 0.01, "float16": 0.3, "bfloat16": 1.0}
"""Nats; a model that differs from itself by more from batch to batch does not keep its rows apart."""
SMALL = 4 * 2**30  # bytes of a model in float32 that is looked at again in that precision
CACHED = 16.0  # times that is what a state that is carried on may differ from one computed as a whole


def verdict(model: Any, spec: ModelSpec, special: Sequence[int] = ()) -> Verdict:
    """The verdict on a loaded model, from the cache folder or by running it on a few rows.

    Args:
        special: token ids that the rows do without.

    Raises:
        ModelError: the model cannot be trained as a causal language model, or the engine would give other numbers.
    """
    path = cache_folder() / "verdicts" / f"{key_of(model, spec)}.json"
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _read(read_sealed(path), spec)
    found: Verdict | str
    try:
        found = prove(model, special)
    except _Refused as refused:
        found = str(refused)
    plain = {"refused": found} if isinstance(found, str) else dataclasses.asdict(found)
    with suppress(OSError):  # a cache that cannot be written costs time, not correctness
        write_sealed(path, plain)
    return _read(plain, spec)


def prove(model: Any, special: Sequence[int] = ()) -> Verdict:
    """Runs a model on a few rows, each way; see `verdict`. Leaves the model as it was.

    Raises:
        ModelError: as `verdict`, without the model's name.
    """
    import torch

    with torch.no_grad(), quiet(), _evaluating(model):
        if model.dtype != torch.float32 and _fits_in_float32(model):
            # what rounding hides in bfloat16 is as wrong as what it shows: float32 decides
            with suppress(torch.OutOfMemoryError), _in_float32(model):
                return _accepted(_Rows(model, special).verdict())
        return _accepted(_Rows(model, special).verdict())


def key_of(model: Any, spec: ModelSpec) -> str:
    """Identity of a verdict: all that what it was measured on depends on."""
    import torch
    import transformers

    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    files = [] if spec.source == "random" else local_files(spec)
    described = [
        VERSION, dataclasses.asdict(spec) | {"name": ""}, files, type(model).__name__, str(model.dtype), device,
        torch.__version__, transformers.__version__, model.config._attn_implementation,
        bool(getattr(model, "is_loaded_in_4bit", False)),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:20]


def rows(model: Any, special: Sequence[int] = ()) -> "list[Tensor]":
    """The rows that a model is proved on: ordinary token ids, as many as `LENGTHS` says."""
    import torch

    generator = torch.Generator().manual_seed(0)
    usable = torch.tensor(_usable_ids(model, special))
    chosen = usable[torch.randint(len(usable), (len(LENGTHS), max(LENGTHS)), generator=generator)]
    return [row[:length].to(model.device) for row, length in zip(chosen, LENGTHS, strict=True)]


class _Refused(ModelError):
    """Why a model is not trained, as a clause."""


def _accepted(found: "Verdict | str") -> Verdict:
    if isinstance(found, str):
        raise _Refused(found)
    return found


def _read(plain: Mapping[str, Any], spec: ModelSpec) -> Verdict:
    if "refused" in plain:
        raise ModelError(f"model={spec.name}: {plain['refused']}")
    return Verdict(**{**plain, "head": HeadForm(**plain["head"])})


class _Rows:
    """The rows of one proof and what the stock model says of them, each alone and unpadded."""

    def __init__(self, model: Any, special: Sequence[int]) -> None:
        import torch

        self.model, self.torch, self.rows = model, torch, rows(model, special)
        self.lengths = torch.tensor(LENGTHS, device=model.device)

    def verdict(self) -> "Verdict | str":
        """The verdict; a clause says why there is none."""
        from sweeper.models.forward import inner_model, last_hidden
        from sweeper.models.head import head_form

        inner, kind = inner_model(self.model), type(self.model).__name__
        if inner is None:
            return f"{kind} has no inner model that ends in hidden states"
        try:
            with _states_of(inner) as states:
                self.alone = [self._stock(row[None])[0] for row in self.rows]
            # some models call a part of their inner model, and not it
            hidden = states[0] if states else last_hidden(inner(input_ids=self.rows[0][None], use_cache=False))
            self.rounding = self._rounding()
            if not self.rounding <= MOST_ROUNDING[str(self.model.dtype).removeprefix("torch.")]:
                return (
                    f"{kind} gives a row other log-probabilities beside other rows than alone (by up to "
                    f"{self.rounding:.2g} nats): its rows are not independent"
                )
            ahead = self._looks_ahead()
            if ahead is not None:
                return ahead
        except FAILURES as error:
            if lost.is_of_device(error):
                raise
            return f"{kind} cannot run as a language model: {type(error).__name__}: {gist(error)}"
        head = head_form(self.model, hidden[0], self.logits[0])
        if head is None:
            return f"{kind} makes its logits of more than its last hidden states"
        self.head = head
        found = {"rounding": self.rounding}
        why = ""
        ways: tuple[Padding, ...] = ("causal", "masked")
        for padding in ways:
            try:
                found[padding] = self._padded(inner, padding)
            except FAILURES as error:
                if lost.is_of_device(error):
                    raise
                why = f"{kind} cannot run rows padded to one length: {type(error).__name__}: {gist(error)}"
                continue
            if found[padding] <= self.tolerance:
                break
            why = (
                f"{kind} gives a row other log-probabilities in a padded batch than alone "
                f"(by up to {found[padding]:.2g} nats, where rounding explains {self.tolerance:.2g})"
            )
        else:
            return why
        found["cached"] = self._grown(inner)
        return Verdict(
            padding=padding, cached=found["cached"] <= CACHED * self.tolerance, head=head,
            differences={name: value for name, value in found.items() if value < float("inf")},
        )  # fmt: skip

    @property
    def tolerance(self) -> float:
        """The largest difference that rounding explains, in nats."""
        largest = max(float(row[row.isfinite()].abs().max()) for row in self.alone)
        dtype = self.model.dtype
        units = ULPS[str(dtype).removeprefix("torch.")] * float(self.torch.finfo(dtype).eps)
        return max(ROUNDING * self.rounding, units * max(1.0, largest))

    def _stock(self, ids: "Tensor") -> "Tensor":
        """Log-probabilities [rows, T, V] of the stock model."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        if not hasattr(self, "logits"):
            self.logits = logits  # of the first row
        return logits.float().log_softmax(-1)

    def _rounding(self) -> float:
        """The stock model against itself: a row alone, and three times over in one batch."""
        return largest(self._stock(self.rows[0].repeat(3, 1))[-1], self.alone[0])

    def _looks_ahead(self) -> str | None:
        """Why the model is no causal one, if it is none: what comes later must change nothing of what comes before."""
        short = self._stock(self.rows[0][None, :AHEAD])[0]
        difference = largest(short, self.alone[0][:AHEAD])
        return None if difference <= self.tolerance else self._why_ahead(difference)

    def _why_ahead(self, difference: float) -> str:
        kind = type(self.model).__name__
        if (most := stretching(self.model.config)) is not None and most < max(LENGTHS):
            return f"{kind} turns its rotary positions faster or slower by the length of a batch beyond {most} tokens"
        return (
            f"{kind} looks at the tokens that follow (log-probabilities change by up to {difference:.2g} nats with "
            "them), as an encoder does: it cannot be trained to predict them"
        )

    def _padded(self, inner: Any, padding: Any) -> float:
        """The engine's way through rows padded to one length, in training mode."""
        from sweeper.models.forward import hidden_states

        ids = self.torch.nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        self.model.train()
        try:
            states = hidden_states(inner, ids, self.lengths, padding)
        finally:
            self.model.eval()
        return max(
            largest(self._log_probabilities(row[: len(alone)]), alone)
            for row, alone in zip(states, self.alone, strict=True)
        )

    def _grown(self, inner: Any) -> float:
        """Rows shortened, padded on the left and grown again through the cache."""
        from sweeper.models.forward import CachedDecoding

        lengths = [len(row) - GROWN for row in self.rows]
        ids = self.torch.zeros(len(self.rows), max(lengths), dtype=self.torch.int64, device=self.model.device)
        mask = self.torch.zeros_like(ids)
        for place, (row, length) in enumerate(zip(self.rows, lengths, strict=True)):
            ids[place, -length:], mask[place, -length:] = row[:length], 1
        worst = 0.0
        try:
            decoding = CachedDecoding(inner, self.model, ids, mask)
            for step in range(GROWN + 1):
                found = self._log_probabilities(decoding.hidden())
                for place, length in enumerate(lengths):
                    worst = max(worst, largest(found[place], self.alone[place][length + step - 1]))
                if step < GROWN:
                    decoding.append(self.torch.stack([r[n + step] for r, n in zip(self.rows, lengths, strict=True)]))
        except Exception as error:  # a state that is no key-value cache fails in many ways
            if lost.is_of_device(error):
                raise
            return float("inf")
        return worst

    def _log_probabilities(self, hidden: "Tensor") -> "Tensor":
        from sweeper.models.head import logits_of

        return logits_of(self.model, self.head, hidden).log_softmax(-1)


def stretching(config: Any) -> int | None:
    """Tokens up to which rotary positions are what they are; beyond, the longest row of a batch changes all of them.

    None where they never change: dynamic NTK scaling and LongRoPE do so.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    found = []
    for one in kinds:
        if one.get("rope_type", one.get("type")) in ("dynamic", "longrope"):
            most = one.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            found.append(int(most or text.max_position_embeddings))
    return min(found, default=None)


def largest(found: "Tensor", wanted: "Tensor") -> float:
    """The largest difference; infinite where one has numbers that the other has not."""
    both = found.isfinite() & wanted.isfinite()
    if not bool((found.isfinite() == wanted.isfinite()).all()):
        return float("inf")
    return float((found - wanted)[both].abs().max())


def _usable_ids(model: Any, special: Sequence[int]) -> list[int]:
    """Ordinary token ids: none that the config or the tokenizer gives a meaning."""
    config = model.config
    text = config.get_text_config()
    named = {
        value
        for name, value in {**vars(config), **vars(text)}.items()
        if name.endswith(("_token_id", "_token_index", "_id", "_index")) and isinstance(value, int)
    }
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None) or text.vocab_size
    return [token for token in range(min(rows, 4096)) if token not in named and token not in set(special)]


def _fits_in_float32(model: Any) -> bool:
    """Whether a copy of the weights in float32 is quick to make."""
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return size <= SMALL and not getattr(model, "is_loaded_in_4bit", False)


@contextmanager
def _in_float32(model: Any) -> "Iterator[None]":
    """Within it, the floating-point weights of a model are in float32."""
    import torch

    held: dict[torch.Tensor, torch.Tensor] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            held[tensor] = tensor.data
            tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, data in held.items():
            tensor.data = data


@contextmanager
def _states_of(inner: Any) -> "Iterator[list[Tensor]]":
    """Within it, the last hidden states of each pass through an inner model are kept."""
    from sweeper.models.forward import last_hidden

    found: list[Tensor] = []
    hook = inner.register_forward_hook(lambda module, args, output: found.append(last_hidden(output)))
    try:
        yield found
    finally:
        hook.remove()


@contextmanager
def _evaluating(model: Any) -> "Iterator[None]":
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
