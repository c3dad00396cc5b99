"""Fuzz the readers of `tests/robustness/readers.py`, guided by the coverage of pha's code.

    pip install atheris
    python scripts/fuzz.py --minutes 60 --out fuzz.json
    python scripts/fuzz.py records "model config" --minutes 2

Inputs that make a reader raise anything but a PHAError, or take over ten seconds, are kept in
--findings (tests/robustness/corpus, where a test replays them).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tests" / "robustness" / "corpus"
SLICE = 60  # seconds that one reader is fuzzed at a time
SLOW = 10  # seconds that a small input may take
BYTES = 1 << 14  # of an input at most
ADDRESS_SPACE = 12 << 30


def fuzz_one(name: str, seconds: float, seed: int, state: Path, findings: Path) -> None:
    """Fuzz one reader for a while in this process, which libFuzzer ends."""
    import resource

    import atheris  # type: ignore[import-untyped]

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    with atheris.instrument_imports(include=["pha"]):
        from pha.utils.errors import PHAError
        from tests.robustness.readers import readers

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    reader = readers()[name]
    corpus = state / name.replace(" ", "-")
    corpus.mkdir(parents=True, exist_ok=True)
    (corpus / "sample").write_bytes(reader.sample)
    for kept in findings.glob(f"{name.replace(' ', '-')}-*"):
        (corpus / kept.name).write_bytes(kept.read_bytes())
    path = Path(tempfile.mkdtemp(prefix="pha-fuzz-")) / reader.name
    counts = {"inputs": 0, "accepted": 0}
    seen: set[str] = set()
    tally = state / f"{corpus.name}.json"

    def keep(data: bytes, error: BaseException | str) -> None:
        """Keep one input for each kind of error."""
        where = str(error)
        if isinstance(error, BaseException):
            trace, kind = error.__traceback__, type(error).__name__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            where = (
                f"{kind} {trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else kind
            )
        if where in seen:
            return
        seen.add(where)
        digest = hashlib.sha256(data).hexdigest()[:8]
        findings.mkdir(parents=True, exist_ok=True)
        (findings / f"{corpus.name}-{digest}").write_bytes(data)
        print(f"finding: {name} {digest}: {where}: {error}"[:400], flush=True)

    def one_input(data: bytes) -> None:
        counts["inputs"] += 1
        begin = time.monotonic()
        try:
            path.write_bytes(data)
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                reader.read(path)
            counts["accepted"] += 1
        except PHAError:
            pass
        except Exception as error:
            keep(data, error)
        if time.monotonic() - begin > SLOW:
            keep(data, f"takes over {SLOW} s")
        if counts["inputs"] % 64 == 0 or time.monotonic() > end - 2:
            tally.write_text(json.dumps(counts))

    end = time.monotonic() + seconds
    words = ["fuzz", str(corpus), f"-max_total_time={max(1, round(seconds))}", f"-seed={seed}"]
    words += [f"-max_len={max(BYTES, 2 * len(reader.sample))}", "-rss_limit_mb=0", "-verbosity=0"]
    atheris.Setup(words, one_input)
    atheris.Fuzz()


def main() -> None:
    """Fuzz the named readers, or all of them, in turn, each slice in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of readers; all where left out")
    parser.add_argument("--minutes", type=float, default=1.0, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=CORPUS, help="where findings are kept")
    parser.add_argument("--out", type=Path, help="write figures as JSON")
    parser.add_argument("--state", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.state:
        fuzz_one(
            options.names[0], options.minutes * 60, options.seed, options.state, options.findings
        )
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    import torch

    from pha.utils.hardware import provenance
    from tests.robustness.readers import readers

    names = options.names or list(readers())
    state = Path(tempfile.mkdtemp(prefix="pha-fuzz-state-"))
    report = {name: {"inputs": 0, "accepted": 0, "seconds": 0.0, "crashes": 0} for name in names}
    begin, turn = time.monotonic(), 0
    generator = random.Random(options.seed)
    before = set(options.findings.glob("*"))
    while (left := options.minutes * 60 - (time.monotonic() - begin)) > 1:
        name = names[turn % len(names)]
        turn += 1
        seconds, started = min(SLICE, left), time.monotonic()
        words = [sys.executable, __file__, name, "--state", state, "--findings", options.findings]
        words += ["--minutes", seconds / 60, "--seed", generator.randrange(1, 1 << 31)]
        tally = state / f"{name.replace(' ', '-')}.json"
        tally.unlink(missing_ok=True)
        done = subprocess.run([str(word) for word in words], cwd=state, capture_output=True)
        for line in done.stdout.decode(errors="replace").splitlines():
            if line.startswith("finding"):
                print(line, flush=True)
        entry = report[name]
        entry["seconds"] += round(time.monotonic() - started, 1)
        if tally.is_file():
            for key, value in json.loads(tally.read_text()).items():
                entry[key] += value
        if done.returncode:
            entry["crashes"] += 1
            print(f"{name}: exit code {done.returncode}: {done.stderr[-600:].decode()}")
        total = sum(each["inputs"] for each in report.values())
        print(
            f"{time.monotonic() - begin:5.0f} s {name}: {entry['inputs']:,} of {total:,} inputs",
            flush=True,
        )
        if options.out:
            new = sorted(path.name for path in set(options.findings.glob("*")) - before)
            content = {
                "kind": "fuzz",
                "hours": round((time.monotonic() - begin) / 3600, 4),
                "inputs": total,
                "seed": options.seed,
                "readers": report,
                "findings": new,
                "provenance": provenance(torch.device("cpu"), "-"),
            }
            options.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
