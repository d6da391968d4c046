"""Hugging Face Transformers behind JSON lines: what `TransformersServer` (src/transformers.rs) starts.

Requests wait until there is a batch of them or a timeout has passed; prompts are padded on the left to the longest;
`model.generate` runs the batch, greedily, until its longest sequence ends. A `StoppingCriteria` sees every step's
tokens: it sends them on and says which rows are done. README.md beside this file describes the protocol.

Standard output carries the protocol alone; what libraries print goes to standard error.
"""

import collections
import json
import os
import sys
import threading
import time

PROTOCOL = 1

out = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)


def send(kind, **fields):
    out.write(json.dumps({"type": kind, **fields}, separators=(",", ":")) + "\n")
    out.flush()


class Inbox:
    """Commands, read by a thread of its own so that the parent's pipe never fills."""

    def __init__(self):
        self.commands = collections.deque()
        self.changed = threading.Condition()
        self.offset = 0.0  # parent's clock minus time.monotonic()

    def start(self):
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in sys.stdin:
            arrived = time.monotonic()
            command = json.loads(line)
            if command["type"] == "clock":
                self.offset = command["now_s"] - arrived
                continue
            with self.changed:
                self.commands.append((command, arrived))
                self.changed.notify()
        os._exit(0)  # the parent is gone or done with us

    def take(self, patience=0.0):
        """All commands that have come; waits for one up to `patience` seconds (None: for ever)."""
        with self.changed:
            if not self.commands and patience != 0.0:
                self.changed.wait(patience)
            commands, self.commands = self.commands, collections.deque()
        return commands


class Row:
    def __init__(self, request, limit, arrived):
        self.id = request["id"]
        self.prompt = request["prompt"]
        self.limit = limit
        traced = request["end"]
        self.end = limit if traced is None else min(limit, traced)
        self.reason = "stop" if self.end == traced else "length"
        self.arrived = arrived
        self.emitted = 0
        self.cancelled = False

    def live(self):
        return not self.cancelled and self.emitted < self.end

    def kv(self, passes):
        """Tokens whose K and V are held after so many passes, and those still to come."""
        wanted = self.emitted if self.cancelled else self.end - 1
        fed = min(passes - 1, wanted)
        return len(self.prompt) + fed, wanted - fed


class Server:
    def __init__(self, inbox, hello, model, torch):
        self.inbox, self.model, self.torch = inbox, model, torch
        self.batch_size = hello["batch_size"]
        self.batch_timeout = hello["batch_timeout_s"]
        self.record_steps = hello["record_steps"]
        config = model.config
        self.vocab_size = config.vocab_size
        self.max_model_len = hello["max_model_len"] or config.max_position_embeddings
        self.kv_slots = None
        if hello["kv_bytes"] is not None:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            row = config.num_hidden_layers * config.num_key_value_heads * head_dim
            self.kv_slots = hello["kv_bytes"] // (2 * row * model.dtype.itemsize)
        self.waiting = collections.deque()
        self.running = []
        self.step = 0

    def refusal(self, request):
        prompt, limit = request["prompt"], request["max_tokens"]
        if not prompt:
            return "the prompt is empty"
        if limit == 0 or request["end"] == 0:
            return "no output token is wanted"
        if max(prompt) >= self.vocab_size:
            return f"token id {max(prompt)} is outside the vocabulary of {self.vocab_size}"
        if len(prompt) >= self.max_model_len:
            return f"a prompt of {len(prompt)} leaves no room in {self.max_model_len} tokens"
        wanted = len(prompt) + min(limit, self.max_model_len - len(prompt))
        if self.kv_slots is not None and wanted > self.kv_slots:
            return f"its KV may grow to {wanted} tokens, the memory holds {self.kv_slots}"
        return None

    def obey(self, commands):
        for command, arrived in commands:
            if command["type"] == "submit":
                reason = self.refusal(command)
                if reason is None:
                    limit = min(command["max_tokens"], self.max_model_len - len(command["prompt"]))
                    self.waiting.append(Row(command, limit, arrived))
                else:
                    send("rejected", id=command["id"], reason=reason)
            elif command["type"] == "cancel":
                self.cancel(command["id"])
            else:
                raise ValueError(f"unknown command {command['type']!r}")

    def cancel(self, wanted):
        for row in self.waiting:
            if row.id == wanted:
                self.waiting.remove(row)
                send("cancelled", id=wanted)
                return
        for row in self.running:
            if row.id == wanted and row.live():
                row.cancelled = True

    @staticmethod
    def reservation(rows):
        return len(rows) * (max(len(r.prompt) for r in rows) + max(r.limit for r in rows))

    def next_batch(self):
        """How many of the first requests make the next batch, and whether waiting longer could not add to it."""
        rows = []
        for row in self.waiting:
            if len(rows) == self.batch_size:
                return len(rows), True
            rows.append(row)
            if self.kv_slots is not None and self.reservation(rows) > self.kv_slots:
                return len(rows) - 1, True
        return len(rows), len(rows) == self.batch_size

    def serve(self):
        while True:
            self.obey(self.inbox.take())
            if not self.waiting:
                self.obey(self.inbox.take(None))
                continue
            patience = self.waiting[0].arrived + self.batch_timeout - time.monotonic()
            count, full = self.next_batch()
            if patience > 0 and not full:
                self.obey(self.inbox.take(patience))
                continue
            self.run([self.waiting.popleft() for _ in range(count)])

    def run(self, rows):
        torch = self.torch
        self.running = rows
        width = max(len(r.prompt) for r in rows)
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.prompt) :] = torch.tensor(row.prompt)
            mask[i, width - len(row.prompt) :] = 1
        self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=max(r.limit for r in rows),
            stopping_criteria=[Progress(self, rows, width)],
        )
        self.running = []
        for row in rows:
            if row.cancelled:
                send("cancelled", id=row.id)
            else:
                send("finished", id=row.id, reason=row.reason)


class Progress:
    """Called by `generate` after every step, with all ids so far."""

    def __init__(self, server, rows, width):
        self.server, self.rows, self.width = server, rows, width
        self.passes = 0
        self.start = time.monotonic()

    def __call__(self, input_ids, scores, **kwargs):
        server, rows = self.server, self.rows
        tokens = input_ids[:, -1].tolist()
        computed = time.monotonic()
        self.passes += 1
        alive = sum(r.live() for r in rows)
        emitted = []
        for row, token in zip(rows, tokens):
            if row.live():
                row.emitted += 1
                emitted.append([row.id, token])
        if emitted:
            send("tokens", tokens=emitted)
        if server.record_steps:
            self.record(alive, computed)
        server.obey(server.inbox.take())
        self.start = time.monotonic()
        return server.torch.tensor([not r.live() for r in rows], device=input_ids.device)

    def record(self, alive, computed):
        server, rows = self.server, self.rows
        columns = self.width + self.passes - 1
        held = sum(r.kv(self.passes)[0] for r in rows)
        to_come = sum(r.kv(self.passes)[1] for r in rows)
        set_aside = len(rows) * columns
        if server.kv_slots is None:
            to_come = 0
        else:
            set_aside = server.reservation(rows)
        first = self.passes == 1
        prefill = sum(len(r.prompt) for r in rows) if first else 0
        decode = 0 if first else alive
        send(
            "step",
            step=server.step,
            start_s=self.start + server.inbox.offset,
            execute_s=computed - self.start,
            commit_s=time.monotonic() - computed,
            running=alive,
            waiting=len(server.waiting),
            prefill_tokens=prefill,
            decode_tokens=decode,
            padding_tokens=(len(rows) * columns if first else len(rows)) - prefill - decode,
            kv_used=held,
            kv_reserved=to_come,
            kv_internal=max(0, set_aside - held - to_come),
            kv_free=max(0, (server.kv_slots or 0) - set_aside),
        )
        server.step += 1


def missing_packages():
    missing = []
    for name in ("torch", "transformers"):
        try:
            __import__(name)
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
    else:
        fields = json.loads(source["config"])
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        generator = torch.Generator().manual_seed(source["seed"])
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(0.0, 0.02, generator=generator)
                else:
                    weight.fill_(0.0 if name.endswith("bias") else 1.0)
    model = model.to(hello["device"]).eval()
    # Greedy, and no end but ours: whatever the folder's generation settings say.
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
    )
    return model


def main():
    hello = json.loads(sys.stdin.readline() or "{}")
    if hello.get("type") != "hello" or hello.get("protocol") != PROTOCOL:
        send("start_failed", reason=f"protocol {PROTOCOL} expected, got {str(hello)[:200]}")
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(hello["threads"])
    missing = missing_packages()
    if missing:
        send("missing", packages=missing)
        return 2
    import torch
    import transformers

    torch.set_num_threads(hello["threads"])
    torch.set_num_interop_threads(1)
    transformers.logging.set_verbosity_error()
    inbox = Inbox()
    try:
        model = load(hello, torch, transformers)
        server = Server(inbox, hello, model, torch)
    except Exception as error:
        send("start_failed", reason=f"{type(error).__name__}: {error}")
        raise
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    send("ready", protocol=PROTOCOL, versions=versions, vocab_size=server.vocab_size)
    inbox.start()
    server.serve()


if __name__ == "__main__":
    sys.exit(main())
