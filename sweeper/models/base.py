"""Loads base models frozen, with a tokenizer that agrees on the end-of-text token, and resolves their targets."""

import functools
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sweeper.errors import ModelError, SpecError, gist
from sweeper.models import proof
from sweeper.models.architecture import Target, structure
from sweeper.models.files import (
    byte_tokenizer,
    check_weights,
    converted_folder,
    folder,
    gguf_file,
    quiet,
    random_config,
)
from sweeper.models.verdict import Verdict
from sweeper.spec import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MOST_LAYERS = 10_000


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A frozen base model in eval mode with its tokenizer and its adaptable modules.

    `stop_ids` are the ids that generation stops at; the tokenizer's end-of-text id is one of them. `verdict` says how
    the model is to be called.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    targets: tuple[Target, ...]
    spec: ModelSpec
    stop_ids: tuple[int, ...]
    verdict: Verdict


def load(spec: ModelSpec, *, dtype: "torch.dtype", device: "torch.device") -> BaseModel:
    """Loads a base model and proves it: frozen, eval mode, dropout rates 0, no key-value cache in its config.

    The attention implementation is transformers' own choice: scaled_dot_product_attention where the architecture
    supports it, eager otherwise. The first load of a GGUF dequantises it into the cache, which takes about 20 s.

    Raises:
        ModelError: there is no such model, it needs the network and there is none, its files lack weights, or the
            engine would give other numbers than the stock model (`sweeper.models.proof`).
    """
    from transformers import AutoModelForCausalLM

    model: Any
    read: Any = AutoModelForCausalLM.from_pretrained
    with quiet():
        if spec.source == "random":
            model = _random(spec, dtype)
        else:
            where = folder(spec, weights=True)
            config = settle(_config(spec))
            arguments: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": spec.trust_remote_code}
            arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that all are named
            arguments["weights_only"] = True  # a .bin is a pickle, read as tensors or not at all
            try:
                model, account = read(where, **arguments)
            except Exception as error:
                check_weights(where)  # a library's error does not name the file
                raise _failure(spec, "the model cannot be loaded", error) from error
            _check_account(spec, model, account)
    model.eval().requires_grad_(False)
    model.to(device)
    tokenizer = tokenizer_of(spec)
    stops = _stop_ids(spec) or (int(tokenizer.eos_token_id),)
    model.generation_config.eos_token_id = list(stops)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    verdict = proof.verdict(model, spec, tokenizer.all_special_ids)
    targets = structure(model, spec.roles)
    return BaseModel(
        model=model, tokenizer=tokenizer, targets=targets, spec=spec, stop_ids=stops, verdict=verdict
    )  # fmt: skip


def load_tokenizer(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model. Its end-of-text id is one that the model's generation stops at, and it can pad.

    Raises:
        ModelError: as `load`, or the model has no tokenizer with an end-of-text token.
    """
    from transformers import AutoTokenizer

    if spec.source == "random":
        return byte_tokenizer()
    where = folder(spec, weights=False)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise _failure(spec, "its tokenizer cannot be loaded", error) from error
    stops = _stop_ids(spec)
    if stops and tokenizer.eos_token_id not in stops:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(stops[0])
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model={spec.name}: neither its config nor its tokenizer has an end-of-text token (eos_token)"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False  # decoding gives back the text, spaces before commas included
    return tokenizer


def skeleton(spec: ModelSpec) -> tuple[Target, ...]:
    """The targets of a model, from its config alone: no weights are read or allocated.

    Raises:
        ModelError: as `load`.
    """
    return _outline(_key(spec))[0]


def total_parameters(of: "ModelSpec | torch.nn.Module") -> int:
    """Number of parameters of a model, tied ones counted once; of a spec, without reading weights."""
    if isinstance(of, ModelSpec):
        return _outline(_key(of))[1]
    return sum(_numel(parameter) for parameter in of.parameters())


def hidden_size(model: "PreTrainedModel") -> int:
    """Width of the token embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.weight.shape[1])


def held_bytes(model: "torch.nn.Module") -> int:
    """Memory of a model's weights."""
    return sum(_bytes(parameter) for parameter in model.parameters())


def is_tied(of: "ModelSpec | PreTrainedModel") -> bool:
    """Whether the output matrix is the token embedding; of a spec, without reading weights."""
    if isinstance(of, ModelSpec):
        return _outline(_key(of))[2]
    head: Any = of.get_output_embeddings()
    embedding: Any = of.get_input_embeddings()
    return head is not None and head.weight is embedding.weight


def _bytes(parameter: Any) -> int:
    held = parameter.numel() * parameter.element_size()
    state = getattr(parameter, "quant_state", None)
    while state is not None:  # the constants of the blocks, which may be quantised themselves
        held += sum(t.numel() * t.element_size() for t in (state.absmax, state.code) if t is not None)
        state = state.state2
    return int(held)


def _numel(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)  # of a quantised matrix, whose tensor holds packed bytes
    return int(parameter.numel() if state is None else math.prod(state.shape))


def check(spec: ModelSpec) -> None:
    """Raises ModelError if a model would not load: no such file or package, no network, unknown architecture.

    Cheap (config and file names, no weights), so that a grid can be rejected before anything is trained.
    """
    skeleton(spec)
    if spec.source == "path":
        check_weights(folder(spec, weights=True))
    if spec.source in ("path", "hub"):
        _check_plain(spec)


def _check_plain(spec: ModelSpec) -> None:
    """Raises ModelError if a checkpoint's matrices are quantised, which no placement can adapt."""
    found = getattr(_config(spec), "quantization_config", None)
    if found is None:
        return
    kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"model={spec.name}: the weights in {spec.location} are quantised already ({getattr(kind, 'value', kind)}). "
        "Give a plain checkpoint of the model; method=qlora quantises one to 4 bits as it loads it"
    )


def tokenizer_of(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """Like `load_tokenizer`, but shared: do not modify it."""
    return byte_tokenizer() if spec.source == "random" else _tokenizer(_key(spec))


def tokenizer_at_hand(spec: ModelSpec) -> bool:
    """Whether a model's tokenizer can be read without its weights being dequantised first."""
    return spec.source != "gguf" or converted_folder(spec.location).exists()


@functools.lru_cache(maxsize=8)
def _tokenizer(key: str) -> "PreTrainedTokenizerBase":
    return load_tokenizer(ModelSpec(**json.loads(key)))


def learned_positions(of: "ModelSpec | PreTrainedModel") -> int | None:
    """The maximum number of positions; None if positions are computed (rotary). Reads no weights."""
    return _outline(_key(of))[3] if isinstance(of, ModelSpec) else _positions(of)


def check_length(spec: ModelSpec, length: int) -> None:
    """Raises SpecError if texts of `length` tokens exceed the model's learned positions, or are so long that the texts
    of a batch change one another's positions.
    """
    most = learned_positions(spec)
    if most is not None and length > most:
        raise SpecError(
            f"dataset.max_length={length}: model={spec.name} has learned {most} positions. Choose at most {most}."
        )
    most = _outline(_key(spec))[4]
    if most is not None and length > most:
        raise SpecError(
            f"dataset.max_length={length}: beyond {most} tokens the longest row of a batch changes the rotary "
            f"positions of all in model={spec.name} (dynamic or LongRoPE scaling), so scores would depend on the "
            f"batch. Choose at most {most}."
        )


def trained_positions(spec: ModelSpec) -> int | None:
    """The longest text a model was trained on, by its config; None if the config does not say. Reads no weights."""
    config = _config(spec).get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    found = [most]
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one for each kind of layer
        factor, before = one.get("factor"), one.get("original_max_position_embeddings")
        if isinstance(factor, int | float) and isinstance(before, int):
            found.append(int(factor * before))
    return max(found)


def loading_message(spec: ModelSpec) -> str:
    """What `load` is about to do, in a few words for a progress display."""
    if spec.source == "gguf" and not converted_folder(spec.location).exists():
        return f"dequantising {spec.name} into the cache (once, about 20 s)"
    return f"loading {spec.name}"


def tokens_key(spec: ModelSpec) -> str:
    """What distinguishes models' tokenizers in the token cache, besides the tokenizer's own settings."""
    key = f"{spec.source}:{spec.location}@{spec.revision}"
    return key if spec.content is None else f"{key} {spec.content}"


def stock_config(spec: ModelSpec) -> "PretrainedConfig":
    """The model's original config, for saving; `load` disables dropout and caching in its own copy."""
    return _config(spec)


def _random(spec: ModelSpec, dtype: "torch.dtype") -> Any:
    import torch

    config = settle(random_config(spec))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(spec.config.get("seed", 0)))
        # made in float32 and then cast, so that every precision starts from the same weights
        return _from_config(config, dtype=torch.float32).to(dtype)


def _key(spec: ModelSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


@functools.lru_cache(maxsize=64)
def _outline(key: str) -> tuple[tuple[Target, ...], int, bool, int | None, int | None]:
    """Targets, parameters, whether the ends are tied, learned positions, and tokens beyond which rotary ones stretch;
    the spec as JSON, for it cannot be hashed.
    """
    import torch

    spec = ModelSpec(**json.loads(key))
    config = _config(spec)
    try:
        with torch.device("meta"), quiet():
            model = _from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise _failure(spec, "the model cannot be built", error) from error
    found = structure(model, spec.roles), total_parameters(model), is_tied(model), _positions(model)
    return *found, proof.stretching(config)


def _positions(model: Any) -> int | None:
    """The rows of a model's table of positions (GPT-2); None where positions are computed, as rotary ones are."""
    import torch

    most = getattr(model.config, "max_position_embeddings", None)
    rows = {
        module.num_embeddings
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    }
    return most if most is not None and rows & {most, most + 2} else None  # OPT leaves the first two rows free


def _from_config(config: "PretrainedConfig", **arguments: Any) -> Any:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    return build(config, **arguments)


def _config(spec: ModelSpec) -> "PretrainedConfig":
    from transformers import AutoConfig

    if spec.source == "random":
        return random_config(spec)
    arguments: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.source == "gguf" and not converted_folder(spec.location).exists():
        file = gguf_file(spec.location)
        where, arguments["gguf_file"] = file.parent, file.name
    else:
        where = folder(spec, weights=False)
    try:
        with quiet():
            config: PretrainedConfig = AutoConfig.from_pretrained(where, **arguments)
            layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    except Exception as error:
        raise _failure(spec, "its config cannot be read", error) from error
    if isinstance(layers, int) and layers > MOST_LAYERS:  # each is built before a weight is looked for
        raise ModelError(
            f"model={spec.name}: its config has {layers:,} layers, more than the {MOST_LAYERS:,} built here"
        )
    return config


def settle(config: "PretrainedConfig") -> "PretrainedConfig":
    """Sets dropout and router-noise rates to 0 and disables the key-value cache, in nested configs too."""
    from transformers import PretrainedConfig

    config.use_cache = False
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            settle(value)
        elif ("drop" in name or "jitter" in name) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def _stop_ids(spec: ModelSpec) -> tuple[int, ...]:
    """The ids that generation stops at: those of the generation config, else of the config."""
    from transformers import GenerationConfig

    config = _config(spec)
    value = getattr(config.get_text_config(), "eos_token_id", None)
    if spec.source != "random":
        where = folder(spec, weights=False)
        if (where / "generation_config.json").is_file():
            try:
                value = GenerationConfig.from_pretrained(where).eos_token_id or value
            except Exception as error:
                raise _failure(spec, "its generation config cannot be read", error) from error
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _check_account(spec: ModelSpec, model: Any, account: Any) -> None:
    """Raises ModelError if the model has weights that the checkpoint lacks, or the checkpoint has weights not loaded.

    `account` is transformers' own; tied weights are none that are missing.
    """
    kind = type(model).__name__
    faults = [
        (account["missing_keys"], "the checkpoint has no values for"),
        (account["mismatched_keys"], "the checkpoint has other shapes of"),
        (account.get("conversion_errors") or (), "the checkpoint's values cannot be converted for"),
        (_lost(model, account["unexpected_keys"]), "the model has no place for the checkpoint's"),
    ]
    for keys, what in faults:
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in keys)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ModelError(
                f"model={spec.name}: {what} {', '.join(names[:3])}{more}, as a {kind}: it is a checkpoint of another "
                "kind of model, or not whole"
            )


def _lost(model: Any, unexpected: Any) -> list[str]:
    """Tensors of the checkpoint that belong to modules which the model has: a bias or norm that it does not use."""
    modules = {name.removeprefix(f"{model.base_model_prefix}.") for name, _ in model.named_modules()} - {""}
    layers = [name for name in modules if any(part.isdigit() for part in name.split("."))]
    found = []
    for key in unexpected:
        owner, _, leaf = str(key).removeprefix(f"{model.base_model_prefix}.").rpartition(".")
        if leaf in ("weight", "bias") and (owner in layers or owner.rpartition(".")[0] in layers):
            found.append(str(key))
    return found


def _failure(spec: ModelSpec, what: str, error: Exception) -> ModelError:
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return ModelError(
            f"model={spec.name}: {spec.location} brings code of its own, which is not run unless "
            "model.trust_remote_code=true"
        )
    return ModelError(f"model={spec.name}: {what}: {gist(error)}")
