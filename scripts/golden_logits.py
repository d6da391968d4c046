#!/usr/bin/env python3
"""Writes the golden files of engine/tests/golden with Hugging Face Transformers on the CPU.

    pip install torch transformers gguf accelerate
    python scripts/golden_logits.py small                 # five small models with generated weights
    python scripts/golden_logits.py beams                 # what a beam search finds in one of them
    python scripts/golden_logits.py smollm2 [MODEL.gguf]  # SmolLM2-135M-Instruct's weights, dequantized

The small models' weights are a function of the tensor's name and the element's index, which
engine/tests/models/random_model.rs computes too: nothing but the logits needs to be kept. All is computed in float64
where Transformers allows (it normalizes in float32).
"""

import copy
import json
import pathlib
import sys

import numpy as np
import torch
import transformers

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "engine/tests/golden"
MODEL = GOLDEN.parent.parent.parent / "models/SmolLM2-135M-Instruct.Q4_1.gguf"

BASE = dict(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=96, max_position_embeddings=512, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
)
SMALL = {
    "llama3": BASE | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", rope_scaling=LLAMA3, tie_word_embeddings=False,
    ),
    "linear": BASE | dict(
        architectures=["LlamaForCausalLM"], model_type="llama", rope_scaling=dict(rope_type="linear", factor=4.0),
        tie_word_embeddings=True, attention_bias=True,
    ),
    "mistral": BASE | dict(
        architectures=["MistralForCausalLM"], model_type="mistral", head_dim=16, sliding_window=7, tie_word_embeddings=False,
    ),
    "qwen2": BASE | dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", rms_norm_eps=1e-6, use_sliding_window=False,
        sliding_window=256, max_window_layers=2, tie_word_embeddings=True,
    ),
    "qwen3": BASE | dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", head_dim=32, rms_norm_eps=1e-6, attention_bias=False,
        rope_theta=1000000.0, tie_word_embeddings=False, use_sliding_window=False,
    ),
}
TOKENS = [3, 77, 12, 12, 95, 0, 41, 8, 63, 30, 2, 19, 88, 54, 7, 23, 70, 70, 1, 36]


def weights(name, shape):
    """SplitMix64 of the name's FNV-1a hash and the element's index."""
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = ((key ^ byte) * 0x100000001B3) % 2**64
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        x = np.uint64(key) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    unit = (x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    if "norm" in name:
        values = np.float32(1) + np.float32(0.25) * unit
    elif len(shape) == 1:
        values = np.float32(0.5) * unit
    else:
        values = np.float32(np.sqrt(3 / shape[1])) * unit
    return torch.from_numpy(values.reshape(shape))


@torch.no_grad()
def small_model(config):
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**copy.deepcopy(config)), attn_implementation="eager"
    )
    model.eval()
    state = model.state_dict()
    tied = config["tie_word_embeddings"]
    for tensor in state:
        source = "model.embed_tokens.weight" if tied and tensor == "lm_head.weight" else tensor
        state[tensor] = weights(source, tuple(state[tensor].shape))
    model.load_state_dict(state)
    return model.double()


@torch.no_grad()
def small(name, config):
    model = small_model(config)
    logits = model(torch.tensor([TOKENS])).logits[0]
    print(name, "inverse frequencies", model.model.rotary_emb.inv_freq.tolist()[:6])
    write(name, dict(config=config, tokens=TOKENS, logits=[[round(x, 6) for x in row] for row in logits.tolist()]))


@torch.no_grad()
def beams():
    """Sequences and scores for some widths, penalties, rules of stopping and ends."""
    model = small_model(SMALL["llama3"])
    prompt, found = TOKENS[:7], []
    for width in (2, 3, 6):
        for penalty in (-0.5, 0.0, 1.0, 2.0):
            for early in (True, False, "never"):
                for ends in ([], [47], [40, 47, 65]):
                    out = model.generate(
                        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                        max_new_tokens=10, do_sample=False, num_beams=width, num_return_sequences=width,
                        length_penalty=penalty, early_stopping=early, eos_token_id=ends or None, pad_token_id=0,
                        return_dict_in_generate=True, output_scores=True,
                    )
                    outputs = []
                    for sequence, score in zip(out.sequences.tolist(), out.sequences_scores.tolist()):
                        output = sequence[len(prompt):]
                        stop = next((i + 1 for i, token in enumerate(output) if token in ends), len(output))
                        outputs.append(dict(tokens=output[:stop], score=round(score, 6)))
                    found.append(dict(width=width, penalty=penalty, early=str(early).lower(), ends=ends, outputs=outputs))
    write("beams", dict(config=SMALL["llama3"], prompt=prompt, max_new_tokens=10, found=found))


@torch.no_grad()
def smollm2(path):
    path = pathlib.Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = (GOLDEN / "text.txt").read_text()
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    window, stride = 256, 24
    total, count, rows = 0.0, 0, {}
    for start in range(0, len(tokens), window):
        chunk = tokens[start : start + window]
        logits = model(torch.tensor([chunk])).logits[0].double()
        if start == 0:
            for row in (0, 1, 17, 100, 255):
                rows[row] = [round(x, 5) for x in logits[row, ::stride].tolist()]
            best = [int(i) for i in logits.argmax(-1)]
        chosen = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(chunk[1:])[:, None])
        total -= chosen.sum().item()
        count += len(chunk) - 1
    prompt = tokenizer("The capital of France is", add_special_tokens=False).input_ids
    greedy = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    write("smollm2", dict(
        tokens=tokens, window=window, stride=stride, rows=rows, best=best, perplexity=float(np.exp(total / count)),
        prompt=prompt, greedy=greedy[0, len(prompt):].tolist(),
    ))


def write(name, golden):
    made_by = dict(transformers=transformers.__version__, torch=torch.__version__)
    (GOLDEN / f"{name}.json").write_text(json.dumps(dict(made_by=made_by) | golden) + "\n")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["small"]:
            for name, config in SMALL.items():
                small(name, config)
        case ["beams"]:
            beams()
        case ["smollm2"]:
            smollm2(MODEL)
        case ["smollm2", path]:
            smollm2(path)
        case _:
            sys.exit(__doc__)
