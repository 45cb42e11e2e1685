"""Results as PEFT's method_comparison publishes them: its fields, with numbers of our own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL = "meta-llama/Llama-3.2-3B"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EVERY_MODULE = [f"model.layers.{layer}.{part}.{name}" for layer in range(28) for part, name in
                [("self_attn", name) for name in MODULES[:4]] + [("mlp", name) for name in MODULES[4:]]]  # fmt: skip
LORA = {"peft_type": "LORA", "r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "target_modules": ["v_proj", "q_proj"]}
LORA |= {"use_rslora": False, "use_dora": False}
# experiment -> configuration, test accuracy, trainable parameters
EXPERIMENTS: dict[str, tuple[dict[str, Any] | None, float, int]] = {
    "lora/llama-3.2-3B-rank32": (LORA, 0.48, 9_175_040),
    "lora/llama-3.2-3B-rank64": (LORA | {"r": 64, "lora_alpha": 128}, 0.50, 18_350_080),
    "lora/llama-3.2-3B-rank64-rslora": (LORA | {"r": 64, "use_rslora": True}, 0.53, 18_350_080),
    "lora/llama-3.2-3B-rank32-dora": (LORA | {"use_dora": True}, 0.49, 9_404_416),
    "lora/llama-3.2-3B-rank32-linear": (LORA | {"target_modules": "all-linear"}, 0.52, 48_627_712),
    "lora/llama-3.2-3B-rank10-target-mlp": (LORA | {"r": 10, "target_modules": [*MODULES[4:]]}, 0.51, 9_461_760),
    "lora/llama-3.2-3B-rank32-named": (LORA | {"target_modules": EVERY_MODULE}, 0.47, 48_627_712),
    "adalora/llama-3.2-3B-rank32": (
        {"peft_type": "ADALORA", "init_r": 64, "target_r": 32, "r": 8, "target_modules": None}, 0.39, 18_353_664,
    ),
    "ia3/lr_0.001": (
        {"peft_type": "IA3", "target_modules": None, "feedforward_modules": None}, 0.41, 286_720,
    ),
    "prompt_tuning/default": ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 200}, 0.05, 614_400),
    "full-finetuning/llama-3.2-3B-lr_0.00001": (None, 0.51, 3_212_749_824),
}  # fmt: skip


def result(experiment: str, config: Mapping[str, Any] | None, accuracy: float, parameters: int) -> dict[str, Any]:
    """One file of MetaMathQA/results."""
    metrics: list[dict[str, Any]] = [
        {
            "step": step, "valid accuracy": accuracy - 0.05, "train loss": 0.7, "train samples": 4 * step,
            "train time": 75.0, "eval time": 20.0, "tokens / sec": 2900.0, "elapsed time": 0.4 * step,
        }
        for step in (250, 500)
    ]  # fmt: skip
    last = {"step": 5000, "test accuracy": accuracy, "train loss": 0.6, "train samples": 20000}
    metrics.append(last | {"train total tokens": 4_198_051, "forgetting": 0.03})
    packages = {f"{name}-{what}": None for name in ("transformers", "peft", "datasets", "torch", "bitsandbytes")
                for what in ("version", "commit-hash")}  # fmt: skip
    return {
        "run_info": {
            "created_at": "2025-06-19T20:12:04+00:00", "total_time": 1862.8, "experiment_name": experiment,
            "peft_branch": "main",
            "train_config": {
                "model_id": MODEL, "dtype": "bfloat16", "max_seq_length": 768, "batch_size": 4, "batch_size_eval": 50,
                "max_steps": 5000, "eval_steps": 250, "compile": False, "seed": 0, "grad_norm_clip": 1.0,
                "query_template": "Question: {query} Think step by step.\nAnswer:", "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1}, "lr_scheduler": "cosine", "use_amp": False,
                "autocast_adapter_dtype": True, "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
                "attn_implementation": None,
            },
            "peft_config": None if config is None else {
                "task_type": None, "auto_mapping": None, "base_model_name_or_path": MODEL, "revision": None,
                "inference_mode": False, **config,
            },
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": 11_868_786_076, "accelerator_memory_max": 20_937_965_568,
            "accelerator_memory_reserved_99th": 17_994_612_244, "train_time": 1703.6, "file_size": 4 * parameters,
            "num_trainable_params": parameters, "num_total_params": 3_212_749_824, "status": "success",
            "metrics": metrics,
        },
        "meta_info": {
            "model_info": {"sha": "0" * 40, "created_at": "2024-09-18T15:23:48+00:00"},
            "dataset_info": {name: {"sha": "0" * 40, "created_at": "2023-09-21T17:22:46+00:00"}
                             for name in ("metamath", "gsm8k")},
            "package_info": packages | {"peft-version": "0.15.2.dev0", "torch-version": "2.7.1+cu126"},
            "system_info": {"system": "Linux", "machine": "x86_64", "processor": "x86_64", "gpu": "NVIDIA L40S"},
            "pytorch_info": "PyTorch built with: ...",
        },
    }  # fmt: skip


def write_results(folder: Path) -> Path:
    """MetaMathQA/results under a folder: one file an experiment."""
    results = folder / "MetaMathQA" / "results"
    results.mkdir(parents=True)
    for experiment, (config, accuracy, parameters) in EXPERIMENTS.items():
        content = result(experiment, config, accuracy, parameters)
        (results / f"{experiment.replace('/', '--')}.json").write_text(json.dumps(content, indent=2))
    (results.parent / "default_training_params.json").write_text('{"model_id": "x", "max_steps": 5000}')
    return results
