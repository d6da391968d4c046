"""Transformers' own continuous batching, through its `ContinuousBatchingManager`.

The manager schedules and computes in a thread of its own. Here one thread hands it requests as they come, and another
takes its outputs, one a token, and sends them on.
"""

import threading
import time

from common import Intake, or_end, send

# Paged attention by PyTorch's `scaled_dot_product_attention`: what the manager takes where there is no flash attention
# package, on any device. Named, so that what is measured does not depend on what else is installed.
ATTENTION = "paged|sdpa"


class Server:
    def __init__(self, inbox, hello, model, torch, transformers):
        self.inbox = inbox
        self.intake = Intake(hello, model)
        batching = hello["batching"]
        block_size = batching["block_size"]
        blocks = self.intake.kv_slots // block_size
        if blocks == 0:
            raise ValueError(f"kv_bytes hold {self.intake.kv_slots} tokens: not one block of {block_size}")
        # Its allocator always wants room for one token more; a sequence that fills every block would never get on.
        self.intake.kv_slots = blocks * block_size - 1
        model.set_attn_implementation(ATTENTION)
        self.manager = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                block_size=block_size,
                num_blocks=blocks,
                max_batch_tokens=batching["token_budget"],
                max_requests_per_batch=batching["max_running"],
                # Prompts are computed whole, as by the other systems, and a block belongs to one sequence.
                allow_block_sharing=False,
                # What it chooses with this attention; said, since the times in step records rest on it.
                use_async_batching=False,
                use_cuda_graph=False,
            ),
        )
        self.manager.warmup()  # takes the memory, so that what does not fit fails before the first request
        self.watch = Watch(self.manager, inbox, hello["record_steps"])
        self.lock = threading.Lock()
        self.names = {}  # what the manager calls a live request, by id
        self.live = {}  # live requests by that name
        self.submitted = 0

    def serve(self):
        self.manager.start()
        threading.Thread(target=or_end, args=(self.deliver,), daemon=True).start()
        while True:
            self.obey(self.inbox.take(None))

    def obey(self, commands):
        for command, arrived in commands:
            if command["type"] == "submit":
                request = self.intake.admit(command, arrived)
                if request is not None:
                    self.submit(request)
            elif command["type"] == "cancel":
                self.cancel(command["id"])
            else:
                raise ValueError(f"unknown command {command['type']!r}")

    def submit(self, request):
        # A name of its own, since ids may come again: a late cancellation must not meet the next request.
        name = f"{request.id}.{self.submitted}"
        self.submitted += 1
        with self.lock:
            self.names[request.id] = name
            self.live[name] = request
        # Its only other end is a token id, so a trace's end is told as a limit. Nothing is set aside by it.
        taken = self.manager.add_request(
            request.prompt, request_id=name, max_new_tokens=request.end, streaming=True
        )
        if taken is None:
            raise RuntimeError(f"the manager takes no requests any more: {self.fatal_error()}")

    def cancel(self, wanted):
        with self.lock:
            name = self.names.pop(wanted, None)
            if name is None:
                return  # it has ended meanwhile
            del self.live[name]
            # The manager never says that it did; before its next pass it gives the memory back.
            self.manager.cancel_request(name)
            self.watch.forget(name)
            send("cancelled", id=wanted)

    def deliver(self):
        while True:
            output = self.manager.get_result(timeout=1.0)
            if output is None:
                if not self.manager.is_running():
                    raise RuntimeError(f"the manager's thread ended: {self.fatal_error()}")
                continue
            outputs = [output]
            while (output := self.manager.get_result(timeout=0)) is not None:
                outputs.append(output)
            self.pass_on(outputs)

    def fatal_error(self):
        return self.manager.background_thread_status.fatal_error

    def pass_on(self, outputs):
        """Sends what is new in them. An output has all tokens of its request so far."""
        with self.lock:
            tokens, ended = [], []
            for output in outputs:
                request = self.live.get(output.request_id)
                if request is None:
                    continue  # it was cancelled
                if output.error is not None:
                    raise RuntimeError(f"request {request.id} failed: {output.error}")
                fresh = output.generated_tokens[request.emitted :]
                tokens.extend([request.id, token] for token in fresh)
                request.emitted += len(fresh)
                if output.is_finished():
                    if request.emitted != request.end:
                        raise RuntimeError(
                            f"request {request.id} ended after {request.emitted} of {request.end} tokens"
                        )
                    del self.live[output.request_id], self.names[request.id]
                    ended.append((request, self.watch.forget(output.request_id)))
            if tokens:
                send("tokens", tokens=tokens)
            for request, preemptions in ended:
                send("finished", id=request.id, reason=request.reason, preemptions=preemptions)


class Watch:
    """Stands between the manager's loop and the parts that it calls: counts preemptions and times passes.

    The manager gives out neither. With a release that calls these parts otherwise, the run ends with an error.
    """

    def __init__(self, manager, inbox, record_steps):
        self.manager, self.inbox = manager, inbox
        self.processor = processor = manager.batch_processor
        self.queued = {}  # how often a live request was queued, by name
        self.preempted = 0
        self.step = 0
        self.add_waiting_request = processor.scheduler.add_waiting_request
        processor.scheduler.add_waiting_request = self.queue
        if record_steps:
            self.prepare_next_batch = processor.prepare_next_batch
            self.generation_step = processor._generation_step
            self.update_batch = processor.update_batch
            processor.prepare_next_batch = self.prepare
            processor._generation_step = self.compute
            processor.update_batch = self.update

    def queue(self, state):
        """A request is queued when it comes, and again each time it has lost its memory."""
        times = self.queued[state.request_id] = self.queued.get(state.request_id, 0) + 1
        self.preempted += times > 1
        self.add_waiting_request(state)

    def forget(self, name):
        """How often a request that has ended was preempted."""
        return max(0, self.queued.pop(name, 1) - 1)

    def prepare(self):
        start = time.monotonic()
        ready = self.prepare_next_batch()
        if ready:
            self.prepared = time.monotonic()
            self.fields = self.look()
            self.fields.update(start_s=start + self.inbox.offset, schedule_s=self.prepared - start)
        return ready

    def look(self):
        """The batch that was prepared, and the memory: every block has one owner."""
        processor, scheduler, cache = self.processor, self.processor.scheduler, self.processor.cache
        batch = processor.inputs_and_outputs.requests_in_batch
        # A preempted request computes its output anew as part of its prompt.
        decode = sum(part.state.generated_len() > 0 for part in batch)
        prefill = sum(part.query_length for part in batch if part.state.generated_len() == 0)
        free = cache.get_num_free_blocks()
        held = sum(state.position_offset for state in scheduler.active_requests.values())
        preempted, self.preempted = self.preempted, 0
        return {
            "running": len(batch),
            "waiting": len(scheduler.waiting_requests) + self.manager.input_queue.qsize(),
            "prefill_tokens": prefill,
            "decode_tokens": decode,
            "padding_tokens": 0,
            "preempted": preempted,
            "kv_used": held,
            "kv_reserved": 0,
            "kv_internal": (cache.num_blocks - free) * cache.block_size - held,
            "kv_free": free * cache.block_size,
        }

    def compute(self, model):
        self.generation_step(model)
        self.computed = time.monotonic()

    def update(self):
        self.update_batch()
        send(
            "step",
            step=self.step,
            execute_s=self.computed - self.prepared,
            commit_s=time.monotonic() - self.computed,
            **self.fields,
        )
        self.step += 1
