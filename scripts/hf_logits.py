#!/usr/bin/env python3
"""Logits of a model folder by Hugging Face Transformers on a GPU, for engine/tests/gpu/logits.rs: scripts/gpu-check calls it.

hf_logits.py FOLDER OUT: writes OUT.bf16, OUT.f16 and OUT.f32, the logits after each of 150 tokens, computed with weights
and activations of that type, as float32 in the machine's order, [token][vocabulary].
"""

import sys

import torch
import transformers


def main(folder, out):
    # The tokens of the tests: tokens(150, 1) in engine/tests/gpu/main.rs.
    ids = [((i * 2_654_435_761 + 97) % 2**32 >> 9) % 40_000 for i in range(150)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16), ("f32", torch.float32)):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        with torch.no_grad():
            logits = model.to(device).eval()(torch.tensor([ids], device=device)).logits[0]
        with open(f"{out}.{name}", "wb") as file:
            file.write(logits.float().cpu().numpy().tobytes())
    print(f"{folder}: torch {torch.__version__}, transformers {transformers.__version__}, {device}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
