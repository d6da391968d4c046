"""Static batches through `model.generate`.

Requests wait until there is a batch of them or a timeout has passed; prompts are padded on the left to the longest;
`model.generate` runs the batch, greedily, until its longest sequence ends. A `StoppingCriteria` sees every step's
tokens: it sends them on and says which rows are done.
"""

import collections
import time

from common import Intake, Request, send


class Row(Request):
    """A request in a batch, or on its way into one."""

    cancelled = False

    def live(self):
        return not self.cancelled and self.emitted < self.end

    def kv(self, passes):
        """Tokens whose K and V are held after so many passes, and those still to come."""
        wanted = self.emitted if self.cancelled else self.end - 1
        fed = min(passes - 1, wanted)
        return len(self.prompt) + fed, wanted - fed


class Server:
    def __init__(self, inbox, hello, model, torch, transformers):
        self.inbox, self.model, self.torch = inbox, model, torch
        self.batch_size = hello["batching"]["batch_size"]
        self.batch_timeout = hello["batching"]["timeout_s"]
        self.record_steps = hello["record_steps"]
        self.intake = Intake(hello, model, Row)
        # Greedy, and no end but ours: whatever the folder's generation settings say.
        model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, bos_token_id=None, pad_token_id=0
        )
        self.waiting = collections.deque()
        self.running = []
        self.step = 0

    def obey(self, commands):
        for command, arrived in commands:
            if command["type"] == "submit":
                row = self.intake.admit(command, arrived)
                if row is not None:
                    self.waiting.append(row)
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
            if self.intake.kv_slots is not None and self.reservation(rows) > self.intake.kv_slots:
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
                send("finished", id=row.id, reason=row.reason, preemptions=0)


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
        slots = server.intake.kv_slots
        if slots is None:
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
            schedule_s=0.0,
            execute_s=computed - self.start,
            commit_s=time.monotonic() - computed,
            running=alive,
            waiting=len(server.waiting),
            prefill_tokens=prefill,
            decode_tokens=decode,
            padding_tokens=(len(rows) * columns if first else len(rows)) - prefill - decode,
            preempted=0,
            kv_used=held,
            kv_reserved=to_come,
            kv_internal=max(0, set_aside - held - to_come),
            kv_free=max(0, (slots or 0) - set_aside),
        )
        server.step += 1
