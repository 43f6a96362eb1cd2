"""Compares training speed with the Python peer, and prints one table.

    python benches/compare.py --python .venv/bin/python --markdown docs/speed.md

Each method and precision of each side is a child process that speaks the protocol of peer.py. In a round every
process trains the same few steps, one process at a time and the others idle, so that a machine that slows down or
is shared slows all of them alike. A ratio is the median over rounds of the ratio within a round; a speed is the
median over rounds. All processes live at once, and each holds a BERT-base with its optimizer state (about 2 to 3 GB):
`--methods`, `--peer-methods`, `--precisions` and `--sides` choose.

Needs only the standard library; the peer needs requirements-dev.txt.
"""

import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
METHODS = ["vanilla", "child_tuning_f", "child_tuning_d"]
PRECISIONS = ["float32", "bf16"]
SIDES = ["peer", "ours"]
HEADER = ["side", "method", "precision", "tokens/s", "min-max", "vs peer F", "vs our vanilla", "of matrix limit", "peak MB"]


class Child:
    """One process in training, and the real tokens per second of its rounds."""

    def __init__(self, side, method, precision, command, arguments):
        self.side, self.method, self.precision = side, method, precision
        options = {
            "--method": method,
            "--precision": precision,
            "--lengths": str(arguments.lengths.resolve()),
            "--threads": str(arguments.threads),
            "--device": arguments.device,
        }
        command = command + [word for option in options.items() for word in option]
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as problem:
            raise SystemExit(f"error: cannot start {self.name()}: {problem}") from None
        self.ready = self.answer("ready")
        self.speeds = []
        # Seconds of a step's matrix products by themselves, over those of the step.
        self.shares = []
        self.peak = "-"

    def answer(self, key):
        """Returns the next line of the process, an object with `key`."""
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name()} ended with exit code {self.process.wait()}; its words are above")
        try:
            answer = json.loads(line)
            answer[key]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"error: {self.name()} wrote `{line.strip()}`, not a JSON object with `{key}`") from None
        return answer

    def ask(self, line):
        """Sends a line; returns the real tokens per second of the answer and the number of real tokens."""
        with contextlib.suppress(BrokenPipeError):  # if it has ended, `answer` says so
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        answer = self.answer("seconds")
        return answer["tokens"] / answer["seconds"], answer["tokens"]

    def go(self, steps):
        """Trains `steps` steps; returns the real tokens per second and the number of real tokens."""
        return self.ask(f"go {steps}")

    def end(self):
        """Ends the process by ending its input, and notes the most memory that it has held."""
        with contextlib.suppress(OSError, StopIteration):
            lines = pathlib.Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM:"))
            self.peak = f"{int(peak.split()[1]) / 1024:.0f}"
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self.process.stdin.close()
        self.process.wait()

    def name(self):
        """Returns the name for messages."""
        return f"{self.side} {self.method} {self.precision}"


def run_rounds(children, arguments):
    """Runs the uncounted warm-up and the rounds; fills the speeds of every child."""
    if arguments.warm_up:
        for child in children:
            child.go(arguments.warm_up)
    for round_number in range(1, arguments.repeats + 1):
        tokens = {}
        for child in children:
            limit = child.ask("limit")[0] if child.side == "ours" else None
            speed, tokens[child.name()] = child.go(arguments.steps)
            child.speeds.append(speed)
            if limit:
                child.shares.append(speed / limit)
        if len(set(tokens.values())) > 1:
            raise SystemExit(f"error: the sides trained on different batches, in real tokens: {tokens}")
        print(f"round {round_number} of {arguments.repeats} done", file=sys.stderr)


def ratio(child, children, side, method):
    """Returns the median ratio to the child of `side` and `method` with the same precision, or `-` without one."""
    for base in children:
        if (base.side, base.method, base.precision) == (side, method, child.precision):
            ratios = [own / other for own, other in zip(child.speeds, base.speeds, strict=True)]
            return f"{statistics.median(ratios):.2f}"
    return "-"


def table_rows(children):
    """Returns the cells of the table, a row for each child."""
    return [
        [
            child.side,
            child.method,
            child.precision,
            f"{statistics.median(child.speeds):.0f}",
            f"{min(child.speeds):.0f}-{max(child.speeds):.0f}",
            ratio(child, children, "peer", "child_tuning_f"),
            ratio(child, children, "ours", "vanilla"),
            f"{100 * statistics.median(child.shares):.0f} %" if child.shares else "-",
            child.peak,
        ]
        for child in children
    ]


def plain_table(rows):
    """Returns the table as aligned text: words to the left, figures to the right."""
    widths = [max(len(row[column]) for row in [HEADER, *rows]) for column in range(len(HEADER))]

    def line(row):
        cells = (
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(HEADER), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def markdown_table(rows):
    """Returns the table in Markdown."""
    rule = ["---"] * 3 + ["---:"] * (len(HEADER) - 3)
    return "\n".join("| " + " | ".join(row) + " |" for row in [HEADER, rule, *rows])


def processor_name():
    """Returns the processor's model name as Linux gives it, or what Python knows of it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(children, arguments):
    """Returns the line that says where, when and how the figures came about."""
    known = {key: value for child in reversed(children) for key, value in child.ready.items()}
    machine = f"{processor_name()}, {os.cpu_count()} cores"
    if arguments.device != "cpu":
        machine += f", {known.get('device', arguments.device)}"
    command = shlex.join(["python", *sys.argv])
    return (
        f"Median real tokens per second of {arguments.repeats} rounds of {arguments.steps} steps; ratios within a "
        f"precision. Machine: {machine}; {arguments.threads} threads; torch {known.get('torch', 'unknown')}; "
        f"{datetime.date.today().isoformat()}; command: `{command}`"
    )


def choice_of(names):
    """Returns an argument type: a comma-separated selection of `names`, in the order of `names`."""

    def parse(text):
        chosen = text.split(",")
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"`{name}` is not one of {', '.join(names)}")
        return [name for name in names if name in chosen]

    return parse


def parse_arguments():
    """Returns the command line's arguments."""
    parser = argparse.ArgumentParser(description="Compares training speed with the Python peer, and prints one table.")
    parser.add_argument("--ours", default="cargo bench --bench step --", help="the command of our side [%(default)s]")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the peer [this one]")
    parser.add_argument("--lengths", type=pathlib.Path, default=HERE / "rte_lengths.txt", help="a token count a line")
    parser.add_argument("--sides", type=choice_of(SIDES), default=SIDES, help="of peer,ours [both]")
    parser.add_argument("--methods", type=choice_of(METHODS), default=METHODS, help=f"of {','.join(METHODS)} [all]")
    parser.add_argument(
        "--peer-methods",
        type=choice_of(METHODS),
        default=["child_tuning_f"],
        help="of the same, for the peer [child_tuning_f: all three need more than 24 GB beside ours]",
    )
    parser.add_argument(
        "--precisions", type=choice_of(PRECISIONS), default=["float32"], help="of float32,bf16 [float32]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds [%(default)s]")
    parser.add_argument("--steps", type=int, default=2, help="training steps a round [%(default)s]")
    parser.add_argument("--warm-up", type=int, default=1, help="uncounted steps before the rounds [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 [%(default)s]")
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if arguments.repeats < 1 or arguments.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    return arguments


def main():
    arguments = parse_arguments()
    commands = {
        "peer": [arguments.python, str(HERE / "peer.py")],
        "ours": shlex.split(arguments.ours),
    }
    children = []
    try:
        for precision in arguments.precisions:
            for side in arguments.sides:
                for method in arguments.peer_methods if side == "peer" else arguments.methods:
                    children.append(Child(side, method, precision, commands[side], arguments))
        run_rounds(children, arguments)
    finally:
        for child in children:
            child.end()

    rows, source = table_rows(children), provenance(children, arguments)
    print(f"{plain_table(rows)}\n\n{source}")
    if arguments.markdown:
        arguments.markdown.write_text(f"{markdown_table(rows)}\n\n{source}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
