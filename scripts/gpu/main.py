"""Run the stages in order, each within its minutes, and gather what they leave."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from scripts.gpu import packages


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; each has the environment variable of its name, in capitals, as its default."""

    def default(name: str, otherwise: str) -> str:
        return os.environ.get(name.upper()) or otherwise

    parser = argparse.ArgumentParser(prog="scripts/gpu.sh", description=__doc__)
    option = parser.add_argument
    option("--work", type=Path, default=default("work", "runs/gpu"), help="where steps run")
    option("--out", type=Path, help="where the results go, also OUT (WORK/out)")
    option("--stages", default=default("stages", ""), help="comma-separated (all)")
    option("--minutes", type=float, default=default("minutes", "10"), help="for each stage (10)")
    option("--runs", type=int, default=default("runs", "1"), help="processes for each row (1)")
    option("--data", default=default("data", ""), help="token store or text (standard library)")
    option("--tokenizer", default=default("tokenizer", "bpe:16384"), help="for text (bpe:16384)")
    option("--steps", type=int, default=default("steps", "0"), help="of training (as time allows)")
    option("--no-compile", action="store_true", help="nothing under torch.compile")
    option("--tiny", action="store_true", help="a rehearsal in miniature, on any machine")
    options = parser.parse_args(arguments)
    out = os.environ.get("OUT")
    options.out = (options.out or (Path(out) if out else options.work / "out")).resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0 if all steps are done, 1 if some failed or are unfinished, 2 for a mistake."""
    options = parse(arguments)
    gaps = packages.missing()
    for name, loss in gaps.items():
        print(f"missing {name}: {loss}")
    if set(gaps) & set(packages.REQUIRED):
        sys.exit(2)
    sys.exit(run(options, gaps))


def run(options: argparse.Namespace, gaps: dict[str, str]) -> int:
    """All stages that were asked for; what is done already is not done again."""
    from scripts.gpu.collect import collect
    from scripts.gpu.stages import FULL, STAGES, TINY, Plan
    from scripts.gpu.steps import finished, run_step

    names = [name.strip() for name in options.stages.split(",") if name.strip()] or list(STAGES)
    if unknown := [name for name in names if name not in STAGES]:
        print(f"there is no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
        return 2
    if options.minutes <= 0 or options.runs < 1:
        print(f"minutes is {options.minutes} and runs {options.runs}; both must be above 0")
        return 2
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        sizes=TINY if options.tiny else FULL,
        work=work,
        minutes=options.minutes,
        runs=options.runs,
        compiled=not (options.no_compile or options.tiny),
        data=Path(options.data).resolve() if options.data else None,
        tokenizer=options.tokenizer,
        steps=options.steps,
    )
    complete = True
    for name in names:
        end = time.monotonic() + 60 * options.minutes
        for step in STAGES[name](plan):
            if finished(step, work):
                print(f"{step.name}: done before", flush=True)
                continue
            record = run_step(step, work, end - time.monotonic())
            print(
                f"{step.name}: {record['status']}, {record['seconds']:.0f} s {record['reason']}",
                flush=True,
            )
            complete &= record["status"] == "ok"
        try:
            print(f"results: {options.out}, to begin with {collect(plan, options.out, gaps)}")
        except Exception:  # What was measured lies in WORK; the next stage must not be lost to it.
            traceback.print_exc()
            complete = False
    return 0 if complete else 1


if __name__ == "__main__":
    main()
