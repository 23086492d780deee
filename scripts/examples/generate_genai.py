"""Continue a prompt with onnxruntime-genai: `generate_genai.py FOLDER PROMPT NEW`, after `genai_files.py FOLDER`."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime_genai as genai

if __name__ == "__main__":
    folder, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = genai.Model(folder)
    tokenizer = genai.Tokenizer(model)
    tokens = tokenizer.encode(prompt)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(tokens) + new)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    print(tokenizer.decode(np.asarray(generator.get_sequence(0))))
