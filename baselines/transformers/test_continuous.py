"""`python3 -m unittest discover baselines/transformers`: continuous batching against a scripted manager, without torch."""

import io
import json
import queue
import types
import unittest

import common
import continuous
from common import Inbox

CONFIG = types.SimpleNamespace(
    vocab_size=100,
    max_position_embeddings=64,
    hidden_size=8,
    num_attention_heads=2,
    num_key_value_heads=1,
    num_hidden_layers=2,
)
SLOT_BYTES = 2 * 2 * 1 * 4 * 4  # K and V, 2 layers, 1 head of 4 values of 4 bytes
HELLO = {
    "batching": {"kind": "continuous", "token_budget": 32, "max_running": 4, "block_size": 8},
    "max_model_len": None,
    "kv_bytes": 5 * 8 * SLOT_BYTES + 7,
    "record_steps": True,
}


class Manager:
    """What continuous.py uses of a `ContinuousBatchingManager`."""

    def __init__(self):
        self.added, self.cancelled, self.outputs = {}, [], queue.Queue()
        self.input_queue = queue.Queue()
        self.running = True
        self.background_thread_status = types.SimpleNamespace(fatal_error=None)
        self.batch_processor = types.SimpleNamespace(
            scheduler=types.SimpleNamespace(
                add_waiting_request=lambda state: None, active_requests={}, waiting_requests={}
            ),
            cache=types.SimpleNamespace(num_blocks=5, block_size=8, get_num_free_blocks=lambda: 2),
            inputs_and_outputs=types.SimpleNamespace(requests_in_batch=[]),
            prepare_next_batch=lambda: True,
            _generation_step=lambda model: None,
            update_batch=lambda: None,
        )

    def warmup(self):
        pass

    def is_running(self):
        return self.running

    def add_request(self, prompt, request_id, max_new_tokens, streaming):
        if not self.running:
            return None
        assert streaming
        self.added[request_id] = (prompt, max_new_tokens)
        return request_id

    def cancel_request(self, name):
        self.cancelled.append(name)

    def get_result(self, timeout):
        return None if self.outputs.empty() else self.outputs.get()


class Model:
    config = CONFIG
    dtype = types.SimpleNamespace(itemsize=4)

    def set_attn_implementation(self, name):
        self.attention = name

    def init_continuous_batching(self, generation_config, continuous_batching_config):
        self.generation, self.batching = generation_config, continuous_batching_config
        return Manager()


TRANSFORMERS = types.SimpleNamespace(GenerationConfig=dict, ContinuousBatchingConfig=dict)


def output(name, tokens, finished=False, error=None):
    return types.SimpleNamespace(
        request_id=name, generated_tokens=tokens, error=error, is_finished=lambda: finished
    )


class Continuous(unittest.TestCase):
    def setUp(self):
        common.output = io.StringIO()
        self.model = Model()
        self.server = continuous.Server(Inbox(), HELLO, self.model, None, TRANSFORMERS)
        self.manager = self.server.manager

    def submit(self, id, prompt=(1, 2), max_tokens=4, end=3):
        command = {"type": "submit", "id": id, "prompt": list(prompt), "max_tokens": max_tokens, "end": end}
        self.server.obey([(command, 0.0)])

    def sent(self):
        lines = [json.loads(line) for line in common.output.getvalue().splitlines()]
        common.output = io.StringIO()
        return lines

    def test_the_cache_has_the_blocks_that_fit(self):
        self.assertEqual((self.model.batching["num_blocks"], self.model.batching["block_size"]), (5, 8))
        self.assertEqual(self.model.batching["max_batch_tokens"], 32)
        self.assertEqual(self.model.attention, "paged|sdpa")
        with self.assertRaisesRegex(ValueError, "not one block of 8"):
            hello = {**HELLO, "kv_bytes": 7 * SLOT_BYTES}
            continuous.Server(Inbox(), hello, self.model, None, TRANSFORMERS)

    def test_tokens_stream_and_end_where_the_trace_does(self):
        self.submit(1)
        self.submit(2, end=None)
        self.assertEqual([limit for _, limit in self.manager.added.values()], [3, 4])
        first, second = self.manager.added
        self.server.pass_on([output(first, [7]), output(second, [8])])
        self.server.pass_on([output(first, [7, 8]), output(first, [7, 8, 9], True)])
        self.server.pass_on([output(second, [8, 8, 8, 8], True)])
        self.assertEqual(
            self.sent(),
            [
                {"type": "tokens", "tokens": [[1, 7], [2, 8]]},
                {"type": "tokens", "tokens": [[1, 8], [1, 9]]},
                {"type": "finished", "id": 1, "reason": "stop", "preemptions": 0},
                {"type": "tokens", "tokens": [[2, 8], [2, 8], [2, 8]]},
                {"type": "finished", "id": 2, "reason": "length", "preemptions": 0},
            ],
        )
        self.assertEqual((self.server.live, self.server.names), ({}, {}))

    def test_a_cancelled_request_is_silent_and_its_id_may_come_again(self):
        self.submit(1)
        [old] = self.manager.added
        self.server.obey([({"type": "cancel", "id": 1}, 0.0), ({"type": "cancel", "id": 77}, 0.0)])
        self.submit(1)
        new = list(self.manager.added)[1]
        self.server.pass_on([output(old, [5]), output(new, [6])])
        self.assertEqual(self.manager.cancelled, [old])
        self.assertNotEqual(old, new)
        self.assertEqual(
            self.sent(), [{"type": "cancelled", "id": 1}, {"type": "tokens", "tokens": [[1, 6]]}]
        )

    def test_what_cannot_be_served_is_refused(self):
        self.submit(1, prompt=())
        self.submit(2, prompt=[100])
        self.submit(3, end=0)
        self.submit(4, prompt=[1] * 64)
        self.submit(5, prompt=[1] * 30, max_tokens=10)
        self.submit(6, prompt=[1] * 30, max_tokens=9)
        words = ["empty", "vocabulary", "no output", "no room", "the memory holds 39"]
        for line, word in zip(self.sent(), words, strict=True):
            self.assertEqual(line["type"], "rejected")
            self.assertIn(word, line["reason"])
        self.assertEqual(len(self.manager.added), 1)

    def test_errors_end_the_run(self):
        self.submit(1)
        [name] = self.manager.added
        with self.assertRaisesRegex(RuntimeError, "request 1 failed: out of memory"):
            self.server.pass_on([output(name, [7], True, "out of memory")])
        with self.assertRaisesRegex(RuntimeError, "ended after 1 of 3 tokens"):
            self.server.pass_on([output(name, [7], True)])
        self.manager.running = False
        self.manager.background_thread_status.fatal_error = "no device"
        with self.assertRaisesRegex(RuntimeError, "thread ended: no device"):
            self.server.deliver()
        with self.assertRaisesRegex(RuntimeError, "takes no requests any more: no device"):
            self.submit(2)

    def test_passes_and_preemptions_are_recorded(self):
        self.submit(1)
        [name] = self.manager.added
        processor = self.manager.batch_processor
        new = types.SimpleNamespace(request_id=name, position_offset=2, generated_len=lambda: 0)
        old = types.SimpleNamespace(request_id="other", position_offset=20, generated_len=lambda: 3)
        processor.scheduler.add_waiting_request(new)
        processor.scheduler.add_waiting_request(new)
        processor.scheduler.active_requests = {name: new, "other": old}
        processor.inputs_and_outputs.requests_in_batch = [
            types.SimpleNamespace(state=new, query_length=2),
            types.SimpleNamespace(state=old, query_length=1),
        ]
        self.assertTrue(processor.prepare_next_batch())
        processor._generation_step(None)
        processor.update_batch()
        self.server.pass_on([output(name, [7, 8, 9], True)])
        step, _, finished = self.sent()
        counts = {key: value for key, value in step.items() if not key.endswith("_s")}
        self.assertEqual(
            counts,
            {
                "type": "step",
                "step": 0,
                "running": 2,
                "waiting": 0,
                "prefill_tokens": 2,
                "decode_tokens": 1,
                "padding_tokens": 0,
                "preempted": 1,
                "kv_used": 22,
                "kv_reserved": 0,
                "kv_internal": 2,
                "kv_free": 16,
            },
        )
        self.assertEqual(finished["preemptions"], 1)


if __name__ == "__main__":
    unittest.main()
