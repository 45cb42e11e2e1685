"""Base models: loaded frozen, with a tokenizer that agrees on where text ends, and read into targets."""

import functools
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sweeper.errors import ModelError, SpecError, gist
from sweeper.models.architecture import Target, structure
from sweeper.models.files import byte_tokenizer, converted_folder, folder, gguf_file, quiet, random_config
from sweeper.spec import DatasetSpec, ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """A frozen base model in eval mode with its tokenizer and its adaptable modules.

    `stop_ids` are the ids that generation stops at; the tokenizer's end-of-text id is one of them.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    targets: tuple[Target, ...]
    spec: ModelSpec
    stop_ids: tuple[int, ...]


def load(spec: ModelSpec, *, dtype: "torch.dtype", device: "torch.device") -> BaseModel:
    """Loads a base model: frozen, eval mode, dropout rates 0, no key-value cache in its config.

    The attention implementation is transformers' own choice: scaled_dot_product_attention where the architecture
    supports it, eager otherwise. The first load of a GGUF dequantises it into the cache, which takes about 20 s.

    Raises:
        ModelError: there is no such model, or it needs the network and there is none.
    """
    from transformers import AutoModelForCausalLM

    model: Any
    with quiet():
        if spec.source == "random":
            model = _random(spec, dtype)
        else:
            where = folder(spec, weights=True)
            config = _settle(_config(spec))
            arguments: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": spec.trust_remote_code}
            try:
                model = AutoModelForCausalLM.from_pretrained(where, **arguments)
            except Exception as error:
                raise _failure(spec, "the model cannot be loaded", error) from error
    model.eval().requires_grad_(False)
    model.to(device)
    tokenizer = load_tokenizer(spec) if spec.source == "random" else _tokenizer(_key(spec))
    stops = _stop_ids(spec) or (int(tokenizer.eos_token_id),)
    model.generation_config.eos_token_id = list(stops)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return BaseModel(model=model, tokenizer=tokenizer, targets=structure(model, spec.roles), spec=spec, stop_ids=stops)


def load_tokenizer(spec: ModelSpec) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model. Its end-of-text id is one that the model's generation stops at, and it can pad.

    Raises:
        ModelError: as `load`, or the model has no tokenizer that says where text ends.
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
    """Raises ModelError where a model would not load: no such file or package, no network, unknown architecture.

    Cheap (config and file names, no weights), so that a grid can be refused before anything is trained.
    """
    skeleton(spec)
    if spec.source == "path":
        folder(spec, weights=True)
    if spec.source in ("path", "hub"):
        _check_plain(spec)


def _check_plain(spec: ModelSpec) -> None:
    """Raises ModelError where a checkpoint's matrices are no plain numbers, which no placement could adapt."""
    found = getattr(_config(spec), "quantization_config", None)
    if found is None:
        return
    kind = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ModelError(
        f"model={spec.name}: the weights in {spec.location} are quantised already ({getattr(kind, 'value', kind)}). "
        "Give a plain checkpoint of the model; method=qlora quantises one to 4 bits as it loads it"
    )


def check_template(spec: ModelSpec, dataset: DatasetSpec) -> None:
    """Raises DataError where the model's chat template refuses the turns of a dataset that uses it."""
    at_hand = spec.source in ("path", "hub") or (spec.source == "gguf" and converted_folder(spec.location).exists())
    if at_hand and dataset.template == "chat":
        from sweeper import tasks

        tasks.check_template(dataset, _tokenizer(_key(spec)), model=spec.name)


@functools.lru_cache(maxsize=8)
def _tokenizer(key: str) -> "PreTrainedTokenizerBase":
    return load_tokenizer(ModelSpec(**json.loads(key)))


def learned_positions(spec: ModelSpec) -> int | None:
    """The most positions a text may have; None where positions are computed, as rotary ones are. Reads no weights."""
    return _outline(_key(spec))[3]


def check_length(spec: ModelSpec, length: int) -> None:
    """Raises SpecError where texts of `length` tokens have more positions than the model has learned."""
    most = learned_positions(spec)
    if most is not None and length > most:
        raise SpecError(
            f"dataset.max_length={length}: model={spec.name} has learned {most} positions. Choose at most {most}."
        )


def loading_message(spec: ModelSpec) -> str:
    """What `load` is about to do, in a few words for a progress display."""
    if spec.source == "gguf" and not converted_folder(spec.location).exists():
        return f"dequantising {spec.name} into the cache (once, about 20 s)"
    return f"loading {spec.name}"


def stock_config(spec: ModelSpec) -> "PretrainedConfig":
    """The config as the model comes with it, for saving; `load` switches dropout and caching off in its own."""
    return _config(spec)


def _random(spec: ModelSpec, dtype: "torch.dtype") -> Any:
    import torch

    config = _settle(random_config(spec))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(spec.config.get("seed", 0)))
        # made in float32 and then cast, so that every precision starts from the same weights
        return _from_config(config, dtype=torch.float32).to(dtype)


def _key(spec: ModelSpec) -> str:
    return json.dumps(asdict(spec), sort_keys=True)


@functools.lru_cache(maxsize=64)
def _outline(key: str) -> tuple[tuple[Target, ...], int, bool, int | None]:
    """Targets, parameters, whether the ends are tied, learned positions; the spec as JSON, for it cannot be hashed."""
    import torch

    spec = ModelSpec(**json.loads(key))
    config = _config(spec)
    try:
        with torch.device("meta"), quiet():
            model = _from_config(config, trust_remote_code=spec.trust_remote_code)
    except Exception as error:
        raise _failure(spec, "the model cannot be built", error) from error
    return structure(model, spec.roles), total_parameters(model), is_tied(model), _positions(model)


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
            return config
    except Exception as error:
        raise _failure(spec, "its config cannot be read", error) from error


def _settle(config: "PretrainedConfig") -> "PretrainedConfig":
    """Sets every dropout rate to 0 and switches the key-value cache off, in nested configs as well."""
    from transformers import PretrainedConfig

    config.use_cache = False
    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            _settle(value)
        elif "drop" in name and isinstance(value, float):
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
            value = GenerationConfig.from_pretrained(where).eos_token_id or value
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _failure(spec: ModelSpec, what: str, error: Exception) -> ModelError:
    if "custom code" in str(error) or "trust_remote_code" in str(error):
        return ModelError(
            f"model={spec.name}: {spec.location} brings code of its own, which is not run unless "
            "model.trust_remote_code=true"
        )
    return ModelError(f"model={spec.name}: {what}: {gist(error)}")
