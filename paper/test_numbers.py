"""What lib/numbers.typ says of numbers that are there, and that one which is not stops the build by its name. Runs in the
environment and after the build of scripts/paper, which leaves the numbers of the committed runs."""

import json
import unittest

import typst

LIBRARIES = '#import "/paper/lib/numbers.typ": *\n#import "/paper/lib/gpu.typ": *\n'


def text(source):
    """What `source` sets, as text."""
    typst_text = f"{LIBRARIES}#metadata(repr([{source}])) <text>"
    return json.loads(typst.query(typst_text.encode(), "<text>", field="value", one=True, root="."))


class Numbers(unittest.TestCase):
    def assert_stops(self, source, named):
        with self.assertRaises(RuntimeError) as caught:
            text(source)
        self.assertIn(named, str(caught.exception))

    def test_what_is_missing_is_named(self):
        self.assert_stops('#metric("fig3", "decode", "nobody", 15, "ttft")', "fig3, decode, system nobody")
        self.assert_stops('#metric("fig3", "decode", "paged", 16, "ttft")', "fig3, decode, paged at 16 requests/s")
        self.assert_stops('#metric("fig3", "decode", "paged", 15, "acceptance")', "has no acceptance")
        self.assert_stops('#metric("fig3", "decode", "paged", 24, "ttft", over: "max")', "paged / max at 24 requests/s")
        self.assert_stops('#rate-at("fig4", "sharegpt", "paged")', "fig4, sharegpt, paged has no rate_at")
        self.assert_stops('#kept("fig99")', "no run `fig99`")
        self.assert_stops('#time-of("fig8-kernel", "batch-8", "paged-3", 256)', "fig8-kernel, batch-8, paged-3")
        self.assert_stops('#time-of("fig8-kernel", "batch-8", "paged-16", 257)', "batch-8, paged-16 at 257")
        self.assert_stops('#time-of("fig8-kernel", "batch-8", "paged-16", 256, over: "swap")', "has no time over swap")
        self.assert_stops('#bench("overlap/bench-8b.json", "decode", 33, 512)', "no decode of 33 x 512")
        self.assert_stops('#kernel-us("decode, bf16 KV", "1 x 1")', "kernels.txt has no decode, bf16 KV, 1 x 1")

    def test_a_sentence_that_no_longer_holds_stops_the_build(self):
        self.assert_stops('#expect(1 > 2, "one is more than two")', "one is more than two")
        text('#expect(2 > 1, "two is more than one")')

    def test_rates_are_those_of_the_points(self):
        with open("paper/generated/numbers.json") as file:
            panel = next(panel for panel in json.load(file)["fig7"]["panels"] if panel["name"] == "chat")
        for end, rate in [("lowest", panel["rates"][0]), ("highest", panel["rates"][-1])]:
            self.assertEqual(text(f'#rate-text("fig7", "chat", "cached", "{end}")'), f"[{rate:g}]")

    def test_digits(self):
        for value, shown in [("1234.5", "1235"), ("1469", "1469"), ("12.345", "12.3"), ("0.01234", "0.0123"), ("2", "2.00"), ("0", "0"),
                             ("9.999", "10.0"), ("-1.5", "−1.50")]:
            self.assertEqual(text(f"#digits({value})"), f"[{shown}]", value)

    def test_bounds_and_intervals_are_shown(self):
        number = '(value: 3.16, interval: (2.97, 3.36), seeds: 5, known: "at least")'
        shown = text(f"#times({number})")
        for part in ["at least", "3.2", "3.0", "3.4"]:
            self.assertIn(part, shown)
        self.assertNotIn("to", text('#times((value: 3.16, seeds: 1, known: "exactly"))'))


if __name__ == "__main__":
    unittest.main()
