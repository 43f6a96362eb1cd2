"""Measures how time and memory grow, and draws docs/scaling.svg.

    python benches/scaling.py --svg docs/scaling.svg

Steps of a small encoder (hidden size 256, F) against tokens an example, layers and examples a batch; the Fisher pass against
examples; steps and optimizer state of D against p. One quantity grows, the others stand still. Every size is a process of its
own, sizes take turns in each round, and medians over the rounds are shown. The exponent that is found is the slope of a
straight line through the logarithms; the one that is expected is the same slope through what the arithmetic says: for time
the multiplications of matrix products and the optimizer's bytes, for memory weights, moments, gradients and activations.

Needs only the standard library.
"""

import argparse
import datetime
import html
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import compare

HIDDEN = 256
LAYERS = 4
LENGTH = 64
BATCH = 16
VOCABULARY = 30522
# Sizes of what grows.
TOKENS = [32, 64, 128, 256, 512]
LAYER_COUNTS = [2, 4, 8, 16]
BATCHES = [8, 16, 32, 64]
EXAMPLES = [32, 64, 128, 256]
SHARES = [0.05, 0.1, 0.2, 0.4, 0.8]


# What a weight costs AdamW, 28 bytes read and written, in multiplications forward and backward: at 15 GB/s and 300 billion
# operations a second.
MULTIPLICATIONS_A_WEIGHT = 90


def work(tokens=LENGTH, layers=LAYERS, batch=BATCH):
    """Returns the time of a step, in multiplications of matrix products that go forward and backward."""
    products = batch * tokens * layers * (12 * HIDDEN**2 + 2 * tokens * HIDDEN)
    return products + MULTIPLICATIONS_A_WEIGHT * weights(layers)


def activations(tokens=LENGTH, layers=LAYERS, batch=BATCH):
    """Returns the numbers that backward needs of a layer's activations, up to a factor: rows of the width of the hidden
    layer (14 of them, of which 8 are the feed-forward layer), and two squares a head."""
    return batch * tokens * layers * (14 * HIDDEN + 2 * tokens * HIDDEN / 64)


def weights(layers=LAYERS):
    """Returns the number of weights."""
    return layers * 12 * HIDDEN**2 + (VOCABULARY + 512) * HIDDEN


class Panel:
    """One quantity that grows: its sizes, and what is measured and expected at each."""

    def __init__(self, title, unit, sizes, measure, expected):
        self.title, self.unit, self.sizes, self.measure, self.expected = title, unit, sizes, measure, expected
        self.found = [[] for _ in sizes]

    def medians(self, which):
        """Returns the median over rounds at each size, of measure number `which`."""
        return [statistics.median(found[which] for found in own) for own in self.found]


def slope(sizes, values):
    """Returns the exponent of the power of the sizes that the values follow best."""
    points = [(math.log(size), math.log(max(value, 1e-9))) for size, value in zip(sizes, values, strict=True)]
    x, y = (statistics.fmean(point[axis] for point in points) for axis in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def run_step(step, folder, lengths=LENGTH, layers=LAYERS, batch=BATCH, method="child_tuning_f", share=0.3, steps=6):
    """Returns seconds a step, bytes of memory and bytes of the optimizer's state."""
    file = folder / f"lengths_{lengths}_{batch}.txt"
    file.write_text(f"{lengths}\n" * (2 * batch))
    options = {
        "--lengths": str(file), "--layers": layers, "--batch-size": batch, "--method": method, "--share": share,
        "--hidden": HIDDEN, "--threads": 2,
    }  # fmt: skip
    command = [step, *(str(word) for option in options.items() for word in option)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    ready = json.loads(process.stdout.readline())
    seconds = []
    for _ in range(steps):
        process.stdin.write("go 1\n")
        process.stdin.flush()
        seconds.append(json.loads(process.stdout.readline())["seconds"])
    memory = compare.peak_megabytes(process.pid) * 2**20 - ready["resident_before"]
    process.stdin.close()
    process.wait()
    return statistics.median(seconds), memory, ready["state"]


def run_fisher(fisher, folder, examples):
    """Returns seconds of the exact pass over so many examples, and bytes of memory."""
    file = folder / f"fisher_{examples}.txt"
    file.write_text(f"{LENGTH}\n" * examples)
    options = {
        "--lengths": file, "--layers": LAYERS, "--hidden": HIDDEN, "--examples": examples, "--only": "per_example",
        "--precision": "float32", "--turns": 3, "--threads": 2,
    }  # fmt: skip
    command = [fisher, *(str(word) for option in options.items() for word in option)]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    plain = float(re.search(r"plain epoch of .*, s: ([\d.]+)", text)[1])
    epochs = float(re.search(r"per_example, plain epochs: ([\d.]+)", text)[1])
    return plain * epochs, float(re.search(r"(\d+) MB at most", text)[1]) * 1e6


def panels(folder):
    """Returns what is measured."""
    step, fisher = compare.benchmark("step"), compare.benchmark("fisher")
    # float32: weights, gradients and moments, and what activations take.
    fixed = 16 * weights()

    def steps(**sizes):
        return run_step(step, folder, **sizes)[:2]

    def of_share(share):
        seconds, _, state = run_step(step, folder, method="child_tuning_d", share=share)
        return seconds, state

    maskable = LAYERS * 12 * HIDDEN**2
    return [
        Panel(
            "tokens an example", "memory", TOKENS, lambda size: steps(lengths=size, batch=8),
            lambda size: (work(tokens=size, batch=8), fixed + 4 * activations(tokens=size, batch=8)),
        ),
        Panel(
            "layers", "memory", LAYER_COUNTS, lambda size: steps(layers=size),
            lambda size: (work(layers=size), 16 * weights(size) + 4 * activations(layers=size)),
        ),
        Panel(
            "examples a batch", "memory", BATCHES, lambda size: steps(batch=size),
            lambda size: (work(batch=size), fixed + 4 * activations(batch=size)),
        ),
        Panel(
            "examples of the Fisher pass", "memory", EXAMPLES, lambda size: run_fisher(fisher, folder, size),
            lambda size: (size, 1),
        ),
        Panel(
            "p of D", "state", SHARES, of_share,
            # Two moments of each weight of the child and of each outside of the scope, and a bit of mask.
            lambda size: (1, 8 * (size * maskable + weights() - maskable)),
        ),
    ]  # fmt: skip


def drawn(all_panels, source):
    """Returns the plots as SVG: a column a panel, time above memory, both axes logarithmic."""
    width, height, left, top, gap = 190, 150, 46, 34, 62
    total = (left + len(all_panels) * (width + gap), top + 2 * (height + gap) + 26)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" '
        'font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for column, panel in enumerate(all_panels):
        for row, (name, factor) in enumerate([("seconds", 1.0), (f"MB of {panel.unit}", 1e-6)]):
            x0, y0 = left + column * (width + gap), top + row * (height + gap)
            values = [value * factor for value in panel.medians(row)]
            expected = [panel.expected(size)[row] for size in panel.sizes]
            scale = math.exp(statistics.fmean(math.log(a / b) for a, b in zip(values, expected, strict=True)))
            expected_line = [value * scale for value in expected]
            low, high = min(values + expected_line) / 1.3, max(values + expected_line) * 1.3

            def place(size, value, x0=x0, y0=y0, low=low, high=high, panel=panel):
                across = math.log(size / panel.sizes[0]) / math.log(panel.sizes[-1] / panel.sizes[0])
                up = math.log(value / low) / math.log(high / low)
                return f"{x0 + 8 + across * (width - 16):.1f},{y0 + height - up * height:.1f}"

            def line(points, style, panel=panel, place=place):
                joined = " ".join(place(size, value) for size, value in zip(panel.sizes, points, strict=True))
                return f'<polyline fill="none" points="{joined}" {style}/>'

            exponents = f"exponent {slope(panel.sizes, values):.2f}, expected {slope(panel.sizes, expected):.2f}"
            parts += [
                f'<rect x="{x0}" y="{y0}" width="{width}" height="{height}" fill="none" stroke="#bbb"/>',
                line(expected_line, 'stroke="#999" stroke-dasharray="4 3"'),
                line(values, 'stroke="#1f5fa8" stroke-width="2"'),
                f'<text x="{x0}" y="{y0 - 6}">{html.escape(name)}: {exponents}</text>',
            ]
            for size, value in zip(panel.sizes, values, strict=True):
                x, y = place(size, value).split(",")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="#1f5fa8"/>')
                parts.append(f'<text x="{x}" y="{y0 + height + 13}" text-anchor="middle">{size}</text>')
            ends = [(value, float(place(panel.sizes[0], value).split(",")[1])) for value in (values[0], values[-1])]
            for value, y in ends if abs(ends[0][1] - ends[1][1]) > 12 else ends[:1]:
                parts.append(f'<text x="{x0 - 3}" y="{y}" text-anchor="end">{value:.3g}</text>')
            parts.append(
                f'<text x="{x0 + width / 2}" y="{y0 + height + 28}" text-anchor="middle" font-weight="bold">'
                f"{html.escape(panel.title)}</text>"
            )
    parts.append(f'<text x="{left}" y="{total[1] - 10}" fill="#555">{html.escape(source)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description="Measures how time and memory grow, and draws it.")
    parser.add_argument("--rounds", type=int, default=3, help="times that each size is measured [%(default)s]")
    parser.add_argument("--svg", type=pathlib.Path, default=pathlib.Path("docs/scaling.svg"), help="[%(default)s]")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        all_panels = panels(pathlib.Path(folder))
        for round_number in range(1, arguments.rounds + 1):
            for panel in all_panels:
                for size, found in zip(panel.sizes, panel.found, strict=True):
                    found.append(panel.measure(size))
            print(f"round {round_number} of {arguments.rounds} done", file=sys.stderr)
    header = ["what grows", "measure", "exponent", "expected", "from", "to"]
    rows = []
    for panel in all_panels:
        for which, (name, factor) in enumerate([("seconds", 1.0), (f"MB of {panel.unit}", 1e-6)]):
            values = [value * factor for value in panel.medians(which)]
            expected = [panel.expected(size)[which] for size in panel.sizes]
            exponents = [f"{slope(panel.sizes, line):.2f}" for line in (values, expected)]
            rows.append([panel.title, name, *exponents, f"{values[0]:.3g}", f"{values[-1]:.3g}"])
    print(compare.markdown_table(header, rows, 2))
    source = f"Medians of {arguments.rounds} rounds; {compare.processor_name()}; {datetime.date.today().isoformat()}"
    arguments.svg.write_text(drawn(all_panels, source), encoding="utf-8")


if __name__ == "__main__":
    main()
