"""What both ways of batching share: the lines of the protocol, requests, and which of them are refused."""

import collections
import json
import os
import sys
import threading
import time
import traceback

PROTOCOL = 2

output = None
sending = threading.Lock()


def take_output():
    """Keeps standard output for the protocol alone; what libraries print goes to standard error."""
    global output
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)


def send(kind, **fields):
    line = json.dumps({"type": kind, **fields}, separators=(",", ":")) + "\n"
    with sending:
        output.write(line)
        output.flush()


def or_end(work):
    """Does `work`; an error in it ends the process at once, since other threads would keep it alive."""
    try:
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


class Inbox:
    """Commands, read by a thread of its own so that the parent's pipe never fills."""

    def __init__(self):
        self.commands = collections.deque()
        self.changed = threading.Condition()
        self.offset = 0.0  # parent's clock minus time.monotonic()

    def start(self):
        threading.Thread(target=or_end, args=(self.read,), daemon=True).start()

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
                # Longer than a thread can wait is for ever.
                self.changed.wait(None if patience is None else min(patience, threading.TIMEOUT_MAX))
            commands, self.commands = self.commands, collections.deque()
        return commands


class Request:
    """A request that was not refused."""

    def __init__(self, command, limit, arrived):
        self.id = command["id"]
        self.prompt = command["prompt"]
        self.limit = limit
        traced = command["end"]
        self.end = limit if traced is None else min(limit, traced)
        self.reason = "stop" if self.end == traced else "length"
        self.arrived = arrived
        self.emitted = 0


class Intake:
    """Takes requests in, as values of `kind`: refuses those that cannot be served."""

    def __init__(self, hello, model, kind=Request):
        config = model.config
        self.kind = kind
        self.vocab_size = config.vocab_size
        self.max_model_len = hello["max_model_len"] or config.max_position_embeddings
        self.kv_slots = None  # tokens that the memory for KV holds; None: no limit
        if hello["kv_bytes"] is not None:
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            row = config.num_hidden_layers * config.num_key_value_heads * head_dim
            self.kv_slots = hello["kv_bytes"] // (2 * row * model.dtype.itemsize)

    def refusal(self, command):
        prompt, limit = command["prompt"], command["max_tokens"]
        if not prompt:
            return "the prompt is empty"
        if limit == 0 or command["end"] == 0:
            return "no output token is wanted"
        if max(prompt) >= self.vocab_size:
            return f"token id {max(prompt)} is outside the vocabulary of {self.vocab_size}"
        if len(prompt) >= self.max_model_len:
            return f"a prompt of {len(prompt)} leaves no room in {self.max_model_len} tokens"
        wanted = len(prompt) + self.limit(command)
        if self.kv_slots is not None and wanted > self.kv_slots:
            return f"its KV may grow to {wanted} tokens, the memory holds {self.kv_slots}"
        return None

    def limit(self, command):
        return min(command["max_tokens"], self.max_model_len - len(command["prompt"]))

    def admit(self, command, arrived):
        """The request, or None for one that was refused."""
        reason = self.refusal(command)
        if reason is None:
            return self.kind(command, self.limit(command), arrived)
        send("rejected", id=command["id"], reason=reason)
        return None
