#!/usr/bin/env bash
# From a fresh machine to a comparison of placements on a model folder of one's own (here a small GPT-NeoX, untrained).
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
types "make install"
.venv/bin/python - <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["<eos>"], initial_alphabet=alphabet))
fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
shape = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(fast), **shape)).save_pretrained("my_model")
fast.save_pretrained("my_model")
PYTHON
types ".venv/bin/python train.py -m placement=attn,ff,full rank=4 trainer.max_steps=20 study=mine \
  model=path model.location=my_model"
has outputs/mine/summary.md
finish
