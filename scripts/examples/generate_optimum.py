"""Continue a prompt with optimum, by transformers' own `generate`: `generate_optimum.py FOLDER PROMPT NEW`.

The operators of a fused folder go to the session in its options. The tokenizer is read from its file, for the class that
tokenizer_config.json names is of transformers 5 and optimum wants 4.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnxruntime
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import PreTrainedTokenizerFast

LIBRARY = "scalefold_kernels.so"

if __name__ == "__main__":
    folder, prompt, new = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    options = onnxruntime.SessionOptions()
    if (folder / LIBRARY).is_file():
        options.register_custom_ops_library(str((folder / LIBRARY).absolute()))
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, provider="CPUExecutionProvider")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    encoded = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**encoded, max_new_tokens=new, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
