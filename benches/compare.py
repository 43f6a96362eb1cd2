"""Measures training speed against the Python peer and against our own vanilla, and prints one table.

    python benches/compare.py --markdown docs/speed.md
    python benches/compare.py --quick

Each row of the table is a process that speaks the protocol of peer.py. In a round every row starts its process, takes a
warm-up step, trains the same few batches and ends; rows take turns and nothing else of ours runs meanwhile, so that a
machine that slows down or is shared slows all of them alike, and only one model is in memory. A ratio is the median over
rounds of the ratio within a round; a speed is the median over rounds. The Fisher pass and the threshold, which are measured
against themselves, follow, and then the bars.

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
HEADER = [
    "side", "method", "precision", "padding", "tokens/s", "min-max", "vs peer F", "vs peer F float32", "vs our vanilla",
    "of matrix limit", "of floor", "peak MB",
]  # fmt: skip
WORDS = 4  # columns of words, before those of figures


class Row:
    """One row of the table: a command, and what its rounds came to."""

    def __init__(self, side, method, precision, padding, command):
        self.side, self.method, self.precision, self.padding = side, method, precision, padding
        self.command = [*command, "--method", method, "--precision", precision]
        self.speeds, self.matrix_shares, self.floor_shares, self.peaks = [], [], [], []
        self.ready = {}

    def name(self):
        """Returns the name for messages."""
        return " ".join([self.side, self.method, self.precision, self.padding]).strip()

    def round(self, arguments):
        """Starts the process, trains and ends it; returns the number of real tokens."""
        try:
            process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        except OSError as problem:
            raise SystemExit(f"error: cannot start {self.name()}: {problem}") from None
        try:
            self.ready = self.answer(process, "ready")
            limit = self.ask(process, f"limit {arguments.steps}") if self.side == "ours" else None
            found = self.ask(process, f"go {arguments.steps}")
            self.peaks.append(peak_megabytes(process.pid))
        finally:
            with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
                process.stdin.close()
            process.wait()
        self.speeds.append(found["tokens"] / found["seconds"])
        if limit:
            self.matrix_shares.append(limit["seconds"] / found["seconds"])
            self.floor_shares.append(limit["floor_seconds"] / found["seconds"])
        return found["tokens"]

    def ask(self, process, line):
        """Sends a line and returns the answer."""
        with contextlib.suppress(BrokenPipeError):  # if it has ended, `answer` says so
            process.stdin.write(line + "\n")
            process.stdin.flush()
        return self.answer(process, "seconds")

    def answer(self, process, key):
        """Returns the next line of the process, an object with `key`."""
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name()} ended with exit code {process.wait()}; its words are above")
        try:
            answer = json.loads(line)
            answer[key]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"error: {self.name()} wrote `{line.strip()}`, not a JSON object with `{key}`") from None
        return answer


def peak_megabytes(process_id):
    """Returns the most memory that a process has held; nothing where Linux does not say."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path(f"/proc/{process_id}/status").read_text().splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) / 1024
    return None


def run_rounds(rows, arguments):
    """Runs the rounds; fills what the rows found."""
    for round_number in range(1, arguments.repeats + 1):
        tokens = {row.name(): row.round(arguments) for row in rows}
        if len(set(tokens.values())) > 1:
            raise SystemExit(f"error: the sides trained on different batches, in real tokens: {tokens}")
        print(f"round {round_number} of {arguments.repeats} done", file=sys.stderr)


def find(rows, side, method, precision):
    """Returns the first such row, or nothing."""
    wanted = (side, method, precision)
    return next((row for row in rows if (row.side, row.method, row.precision) == wanted), None)


def ratio(row, base):
    """Returns the median over rounds of a row's speed over that of another, or nothing without one."""
    if row is None or base is None:
        return None
    return statistics.median(own / other for own, other in zip(row.speeds, base.speeds, strict=True))


def share(values):
    """Returns the median of shares, or nothing without any."""
    return statistics.median(values) if values else None


def shown(number, form):
    """Returns a number as text, or `-` for nothing."""
    return "-" if number is None else format(number, form)


def table_rows(rows):
    """Returns the cells of the table, a line for each row."""
    peaks = [[peak for peak in row.peaks if peak is not None] for row in rows]
    return [
        [
            row.side,
            row.method,
            row.precision,
            row.padding or "packed",
            f"{statistics.median(row.speeds):.0f}",
            f"{min(row.speeds):.0f}-{max(row.speeds):.0f}",
            shown(ratio(row, find(rows, "peer", "child_tuning_f", row.precision)), ".2f"),
            shown(ratio(row, find(rows, "peer", "child_tuning_f", "float32")), ".2f"),
            shown(ratio(row, find(rows, "ours", "vanilla", row.precision)), ".2f"),
            shown(share(row.matrix_shares), ".0%"),
            shown(share(row.floor_shares), ".0%"),
            shown(max(peak, default=None), ".0f"),
        ]
        for row, peak in zip(rows, peaks, strict=True)
    ]


def bars(rows):
    """Returns what is promised, what was found and whether it holds, as cells."""

    def of(method, precision, base):
        return ratio(find(rows, "ours", method, precision), find(rows, *base))

    def step(method, precision):
        """A step's time over that of vanilla: the inverse of the speeds' ratio."""
        found = of(method, precision, ("ours", "vanilla", precision))
        return None if found is None else 1 / found

    peer = ("peer", "child_tuning_f")
    own = find(rows, "ours", "child_tuning_f", "float32")
    promises = [
        ("F float32 over the peer's F float32", of("child_tuning_f", "float32", (*peer, "float32")), 2.7, True),
        ("F bf16 over the peer's F float32", of("child_tuning_f", "bf16", (*peer, "float32")), 4.2, True),
        ("F bf16 over the peer's F bf16", of("child_tuning_f", "bf16", (*peer, "bf16")), 2.7, True),
        ("F float32, share of the matrix limit", share(own.matrix_shares) if own else None, 0.9, True),
    ]
    for precision in PRECISIONS:
        promises.append((f"F's step over vanilla's, {precision}", step("child_tuning_f", precision), 1.03, False))
        promises.append((f"D's step over vanilla's, {precision}", step("child_tuning_d", precision), 1.02, False))
    return [
        [
            what,
            f"{'at least' if least else 'at most'} {bar}",
            f"{found:.2f}",
            "met" if (found >= bar if least else found <= bar) else "missed",
        ]
        for what, found, bar, least in promises
        if found is not None
    ]


def plain_table(header, rows, words):
    """Returns a table as aligned text: words to the left, figures to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row):
        cells = (
            cell.ljust(width) if column < words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *(line(row) for row in rows)])


def markdown_table(header, rows, words):
    """Returns a table in Markdown."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def benchmark(name):
    """Builds a benchmark of this program and returns its path: a wrapper's memory would not be the benchmark's."""
    command = ["cargo", "bench", "--locked", "--bench", name, "--no-run", "--message-format=json"]
    built = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if built.returncode:
        raise SystemExit(f"error: `{shlex.join(command)}` failed; its words are above")
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message["target"]["name"] == name:
            return message["executable"]
    raise SystemExit(f"error: cargo did not say where the benchmark `{name}` is")


def own_measurements(arguments):
    """Returns what the benchmarks say that measure against themselves, as text."""
    turns = str(2 if arguments.quick else arguments.repeats)
    examples = "32" if arguments.quick else "96"
    commands = [
        ["fisher", "--turns", turns, "--examples", examples, "--device", arguments.device],
        ["threshold", "--turns", turns, "--millions", "40" if arguments.quick else "300"],
    ]
    texts = []
    for name, *options in commands:
        command = [benchmark(name), *options, "--threads", str(arguments.threads)]
        texts.append(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip())
    return "\n".join(texts)


def processor_name():
    """Returns the processor's model name as Linux gives it, or what Python knows of it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def provenance(rows, arguments):
    """Returns the line that says where, when and how the figures came about."""
    known = {key: value for row in reversed(rows) for key, value in row.ready.items()}
    machine = f"{processor_name()}, {os.cpu_count()} cores"
    if arguments.device != "cpu":
        machine += f", {known.get('device', arguments.device)}"
    command = shlex.join(["python", *sys.argv])
    return (
        f"Medians of {arguments.repeats} rounds of {arguments.steps} steps, real tokens. Machine: {machine}, load "
        f"{os.getloadavg()[1]:.1f}; {arguments.threads} threads; torch {known.get('torch', 'unknown')}; "
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
    parser = argparse.ArgumentParser(description="Measures training speed against the Python peer, in one table.")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step, and small sizes after them")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs the peer [this one]")
    parser.add_argument("--lengths", type=pathlib.Path, default=HERE / "rte_lengths.txt", help="a token count a line")
    parser.add_argument("--sides", type=choice_of(SIDES), default=SIDES, help="of peer,ours [both]")
    parser.add_argument("--methods", type=choice_of(METHODS), default=METHODS, help=f"of {','.join(METHODS)} [all]")
    parser.add_argument(
        "--peer-methods",
        type=choice_of(METHODS),
        default=["child_tuning_f"],
        help="of the same, for the peer [child_tuning_f]",
    )
    parser.add_argument(
        "--precisions", type=choice_of(PRECISIONS), default=PRECISIONS, help="of float32,bf16 [both]"
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds [%(default)s]")
    parser.add_argument("--steps", type=int, default=3, help="training steps a round [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each process [%(default)s]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 [%(default)s]")
    parser.add_argument("--only-steps", action="store_true", help="leave the Fisher pass and the threshold out")
    parser.add_argument("--markdown", type=pathlib.Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.steps = 2, 1
    if arguments.repeats < 1 or arguments.steps < 1:
        parser.error("--repeats and --steps must be at least 1")
    return arguments


def rows_of(arguments):
    """Returns the rows that are asked for."""
    options = ["--lengths", str(arguments.lengths.resolve()), "--threads", str(arguments.threads)]
    options += ["--device", arguments.device]
    peer = [arguments.python, str(HERE / "peer.py"), *options]
    rows = []
    for precision in arguments.precisions:
        if "peer" in arguments.sides:
            for method in arguments.peer_methods:
                rows.append(Row("peer", method, precision, "longest", peer))
                rows.append(Row("peer", method, precision, "fixed 128", [*peer, "--padding", "fixed"]))
        if "ours" in arguments.sides:
            step = [benchmark("step"), *options]
            rows += [Row("ours", method, precision, "", step) for method in arguments.methods]
    return rows


def main():
    arguments = parse_arguments()
    rows = rows_of(arguments)
    run_rounds(rows, arguments)
    source = provenance(rows, arguments)
    others = "" if arguments.only_steps or "ours" not in arguments.sides else own_measurements(arguments)
    bar_header = ["bar", "promised", "found", ""]
    print(plain_table(HEADER, table_rows(rows), WORDS))
    print(f"\n{plain_table(bar_header, bars(rows), 1)}\n\n{others}\n\n{source}")
    if arguments.markdown:
        parts = [
            markdown_table(HEADER, table_rows(rows), WORDS),
            markdown_table(bar_header, bars(rows), 1),
            f"```text\n{others}\n```",
            source,
        ]
        arguments.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
