"""Time two checkouts of pha against each other, in turn: what a change did to speed.

    git worktree add ../before COMMIT
    python scripts/compare_versions.py ../before --pairs 6 --json pairs.json

One process for each checkout holds a case; both then work in turn, a unit each, so that a machine
whose rates move moves both. The ratio is of each pair's times; below 1 this checkout is faster.
`--prepare FILE --tokenizer SPEC` adds the preparation of a corpus, a fresh process each time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
# Kind, preset, precision, batch, length. Decoding is 48 tokens a unit, after such a prompt.
CASES: dict[str, tuple[str, str, str, int, int]] = {
    "train pha-tiny": ("train", "pha-tiny", "fp32", 4, 256),
    "train attention-only-tiny": ("train", "attention-only-tiny", "fp32", 4, 256),
    "train pha-125m": ("train", "pha-125m", "fp32", 1, 1024),
    "train pha-125m, bf16": ("train", "pha-125m", "bf16", 1, 1024),
    "prefill pha-180m, 2,048": ("prefill", "pha-180m", "fp32", 1, 2048),
    "prefill pha-180m, 8,192": ("prefill", "pha-180m", "fp32", 1, 8192),
    "decode pha-125m after 256": ("decode", "pha-125m", "fp32", 1, 256),
    "decode pha-125m after 2,048": ("decode", "pha-125m", "fp32", 1, 2048),
}
TOKENS = 48


def make(kind: str, preset: str, precision: str, batch: int, length: int) -> Callable[[], None]:
    """A unit of work of the pha that this process imports."""
    import torch

    from pha.modeling import PHAConfig, PHAForCausalLM
    from pha.utils.hardware import keep_freed_memory

    keep_freed_memory()
    torch.manual_seed(0)
    vocabulary = 2048 if preset.endswith("-tiny") else 50257
    model = PHAForCausalLM(PHAConfig.from_preset(preset, vocab_size=vocabulary))
    ids = torch.randint(vocabulary, (batch, length))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    if kind == "train":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            with autocast:
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step
    model.eval()

    @torch.inference_mode()
    def prefill() -> None:
        with autocast:
            model(ids, logits_to_keep=1)

    if kind == "prefill":
        return prefill
    with torch.inference_mode():
        cache = model(ids, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def decode() -> None:
        for t in range(TOKENS):
            model(ids[:, t : t + 1], past_key_values=cache, logits_to_keep=1)

    return decode


def serve() -> None:
    """Answer lines: a case makes it and works twice; `null` times one more unit."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    unit: Callable[[], None] = serve  # replaced by the first line
    for line in sys.stdin:
        if case := json.loads(line):
            unit = make(*case)
            unit()
        begin = time.perf_counter()
        unit()
        print(time.perf_counter() - begin, file=answers, flush=True)


def _environment(tree: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(tree / "src")}


def _start(tree: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", str(tree)],
        env=_environment(tree),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], case: Any) -> float:
    """Seconds of a unit."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(json.dumps(case), file=process.stdin, flush=True)
    return float(process.stdout.readline())


def prepare(tree: Path, source: str, tokenizer: str) -> float:
    """Seconds of `pha prepare`, imports included."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pha", "prepare", source, "--tokenizer", tokenizer]
        begin = time.perf_counter()
        subprocess.run(
            [*command, "--out", f"{folder}/store"],
            env=_environment(tree),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return time.perf_counter() - begin


def _commit(tree: Path) -> str:
    done = subprocess.run(
        ["git", "-C", tree, "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=6)
    usual = [case for case in CASES if "bf16" not in case]
    parser.add_argument("--cases", nargs="*", default=usual, choices=CASES, metavar="CASE")
    parser.add_argument("--prepare", metavar="FILE")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    trees = {"before": options.before.resolve(), "now": HERE}
    times: dict[str, dict[str, list[float]]] = {}
    for name in options.cases:
        processes = {side: _start(tree) for side, tree in trees.items()}
        for process in processes.values():
            ask(process, CASES[name])
        found: dict[str, list[float]] = {side: [] for side in trees}
        for pair in range(options.pairs):
            for side in sorted(trees, reverse=pair % 2 == 1):
                found[side].append(ask(processes[side], None))
        for process in processes.values():
            process.kill()
            process.wait()
        times[name] = found
        _report(name, found)
    if options.prepare:
        found = {side: [] for side in trees}
        for pair in range(options.pairs):
            for side in sorted(trees, reverse=pair % 2 == 1):
                found[side].append(prepare(trees[side], options.prepare, options.tokenizer))
        times["prepare"] = found
        _report("prepare", found)
    if options.json:
        import torch

        record = {
            "commits": {side: _commit(tree) for side, tree in trees.items()},
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "cases": CASES,
            "seconds": times,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def _report(name: str, found: dict[str, list[float]]) -> None:
    ratios = sorted(b / a for a, b in zip(found["before"], found["now"], strict=True))
    before, now = (statistics.median(found[side]) for side in ("before", "now"))
    print(
        f"| {name} | {before:.3f} s | {now:.3f} s | {statistics.median(ratios):.3f} | "
        f"{ratios[0]:.2f} to {ratios[-1]:.2f} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
