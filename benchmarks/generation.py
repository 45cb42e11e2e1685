#!/usr/bin/env python3
"""Greedy generation for all adapters of a pack at once, against `model.generate` with PEFT, adapter after adapter.

    python -m benchmarks.generation                                                       # 9 adapters, 200 prompts
    python -m benchmarks.generation --device cpu --adapters 3 --prompts 8 --new 16

Random weights of a real shape, random prompts of 16 to 128 tokens, no end of text: both sides write every token. The
adapters are written to disk and loaded by stock PEFT for its side. In float32 (CPU) the texts must be identical.
"""

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file

from benchmarks.shapes import adapter, base_model
from sweeper.training.generate import generate
from sweeper.training.pack import Pack
from sweeper.training.pack_config import PackConfig

ARMS = ("attn", "ff", "full")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--adapters", type=int, default=9)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rows", type=int, default=200, help="prompts of one adapter in a batch, on both sides")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, 40_000, int(n)).tolist()) for n in rng.integers(16, 129, args.prompts)]
    base = base_model(args.model, args.device)
    base.model.generation_config.pad_token_id = 0
    specs = [adapter(base, ARMS[i % 3], (4, 8, 16)[i // 3 % 3], seed=i) for i in range(args.adapters)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Pack(base, [s.ranks for s in specs], PackConfig(batch_size=1)) as pack,
    ):
        for slot, spec in enumerate(specs):
            pack.store.assign(slot, spec)
            randomise(pack, slot, spec)
            save(pack, slot, spec, Path(folder, str(slot)))
        packed, texts = timed(lambda: ours(pack, prompts, args), args.device)
        pack.close()
        loop, expected = theirs(base, folder, prompts, args)
    found = {
        "adapters": args.adapters, "prompts": args.prompts, "new_tokens": args.new, "device": args.device,
        "packed_seconds": round(packed, 2), "generate_seconds": round(loop, 2), "ratio": round(loop / packed, 2),
        "identical_texts": float(np.mean([a == b for x, y in zip(texts, expected, strict=True)
                                          for a, b in zip(x, y, strict=True)])),
    }  # fmt: skip
    print(json.dumps(found))


def randomise(pack, slot, spec) -> None:
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for views in pack.store.views(slot).values():
            for view in views:
                view.copy_(0.02 * torch.randn(view.shape, generator=generator))
    pack.store.publish(slot)


def save(pack, slot, spec, folder: Path) -> None:
    """As stock PEFT would have trained it."""
    (rank,) = set(spec.ranks.values())
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(spec.ranks), task_type="CAUSAL_LM")
    folder.mkdir()
    config.save_pretrained(folder)
    tensors = {}
    for name, (a, b) in pack.store.views(slot).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.t().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")


def ours(pack, prompts, args) -> list[list[tuple[int, ...]]]:
    found = generate(
        pack, range(args.adapters), prompts, max_new_tokens=args.new, stop_ids=[-1], rows=args.rows
    )  # fmt: skip
    return [[text.ids for text in texts] for texts in found]


def theirs(base, folder, prompts, args) -> tuple[float, list[list[tuple[int, ...]]]]:
    """Seconds of generation alone, the adapters' loading left out, and the texts."""
    found, total = [], 0.0
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for slot in range(args.adapters):
        model = PeftModel.from_pretrained(base.model, str(Path(folder, str(slot)))).eval()
        if slot == 0:
            generated(model, prompts, order[: args.rows], args)  # warms up
        began = time.perf_counter()
        texts: dict[int, tuple[int, ...]] = {}
        for start in range(0, len(order), args.rows):
            texts |= generated(model, prompts, order[start : start + args.rows], args)
        total += time.perf_counter() - began
        found.append([texts[i] for i in range(len(prompts))])
        model.unload()
    return total, found


def generated(model, prompts, chosen, args) -> dict[int, tuple[int, ...]]:
    length = max(len(prompts[i]) for i in chosen)
    ids = torch.zeros(len(chosen), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(chosen):
        ids[row, length - len(prompts[i]) :] = torch.tensor(prompts[i])
        mask[row, length - len(prompts[i]) :] = 1
    written = model.generate(
        input_ids=ids.to(args.device), attention_mask=mask.to(args.device), max_new_tokens=args.new,
        min_new_tokens=args.new, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return {i: tuple(written[row, length:].tolist()) for row, i in enumerate(chosen)}


def timed(work, device: str):
    """Seconds and result of the second call; the first one warms up."""
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


if __name__ == "__main__":
    main()
