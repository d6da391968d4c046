"""Hugging Face Transformers behind JSON lines: what `TransformersServer` (src/transformers.rs) starts.

Loads a model and serves it in static batches (static.py) or by Transformers' own continuous batching (continuous.py).
README.md beside this file describes the protocol.
"""

import importlib
import json
import os
import sys

import continuous
import static
from common import PROTOCOL, Inbox, or_end, send, take_output


SERVERS = {"static": static.Server, "continuous": continuous.Server}


def missing_packages(hello):
    names = ["torch", "transformers"]
    if hello["batching"]["kind"] == "continuous" and hello["device"] == "cpu":
        names.append("psutil")  # Transformers asks it how much memory there is, and else takes it for none
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"import {name}: {error}", file=sys.stderr)
            missing.append(name)
    return missing


def load(hello, torch, transformers):
    """The model of a Hugging Face folder, or of a configuration's shape with seeded weights."""
    dtype = getattr(torch, hello["dtype"])
    source = hello["model"]
    if source["kind"] == "folder":
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source["path"], dtype=dtype, local_files_only=True
        )
        return model.to(hello["device"]).eval()
    fields = json.loads(source["config"])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    # Made where they are used: billions of numbers take a CPU minutes.
    with torch.device(hello["device"]):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(hello["device"]).manual_seed(source["seed"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.02, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


def start(hello, inbox):
    """A server whose model is loaded."""
    import torch
    import transformers

    torch.set_num_threads(hello["threads"])
    torch.set_num_interop_threads(1)
    transformers.logging.set_verbosity_error()
    model = load(hello, torch, transformers)
    server = SERVERS[hello["batching"]["kind"]](inbox, hello, model, torch, transformers)
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return server, versions


def main():
    take_output()
    hello = json.loads(sys.stdin.readline() or "{}")
    if hello.get("type") != "hello" or hello.get("protocol") != PROTOCOL:
        send("start_failed", reason=f"protocol {PROTOCOL} expected, got {str(hello)[:200]}")
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(hello["threads"])
    missing = missing_packages(hello)
    if missing:
        send("missing", packages=missing)
        return 2
    inbox = Inbox()
    try:
        server, versions = start(hello, inbox)
    except Exception as error:
        send("start_failed", reason=f"{type(error).__name__}: {error}")
        raise
    send("ready", protocol=PROTOCOL, versions=versions, vocab_size=server.intake.vocab_size)
    inbox.start()
    or_end(server.serve)


if __name__ == "__main__":
    sys.exit(main())
