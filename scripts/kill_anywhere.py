"""Stop real commands at seeded random moments, repeat them, and compare what comes out in the end.

    python scripts/kill_anywhere.py --moments 100 --out results/reliability

Each command runs in a process of its own, forked from this one, in which everything is imported.
The process stops itself at the moment it was given: at one of its file operations, or a time after
it has entered a phase. It is killed, gets a signal, meets a full disk, a read-only file system or
the end of its memory. The same command is repeated, stopped again or not, until it finishes. Then
weights, results and metrics must be those of an undisturbed run, bit for bit, times apart; and
after every stop each checkpoint that can be seen must be whole, with one there if there was before.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a process with threads cannot be forked
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import dataclasses
import hashlib
import importlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from striking import KINDS, Job, draw_aim, run  # type: ignore[import-not-found]

from pha.cli import find_verb
from pha.runs import RunFolder
from pha.train.checkpoint import verify_checkpoint
from pha.utils.files import write_json
from pha.utils.hardware import provenance

CODES = {"SIGKILL": -9, "SIGINT": 130, "full disk": 2, "read-only": 2}  # of the other signals: 75
MOST_STOPS = 6  # of one folder, before its command may finish
TIMES = {
    *("seconds", "tokens_per_second", "data_wait", "utilisation", "matmul_flops"),
    *("peak_memory_bytes", "provenance", "summarised", "memory_end", "speed", "memory"),
}


def torture(job: Job, work: Path, moments: int, seed: int, kinds: Sequence[str]) -> dict[str, Any]:
    """Stop a command at so many moments; returns what happened at each.

    What is done is kept in `work`, and the same call goes on from there.
    """
    folder = work / job.name
    usual_out = folder / "undisturbed" / "run"
    if not (folder / "usual.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        usual_out.parent.mkdir(parents=True)
        ended = run(job, usual_out)
        assert ended.code == 0, ended.said
        write_json(folder / "usual.json", ended.word)
    usual = json.loads((folder / "usual.json").read_text())
    expected = job.outcome(usual_out)
    phases = ["start", *dict.fromkeys(job.phases.values())]
    kept = folder / "trials.json"
    trials: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else []
    while sum(trial["stopped"] for trial in trials) < moments:
        place = folder / f"{len(trials)}"
        shutil.rmtree(place, ignore_errors=True)
        out = place / "run"
        out.parent.mkdir(parents=True)
        found: list[dict[str, Any]] = []
        before, possible = None, phases
        for stop in range(MOST_STOPS + 1):
            number = len(trials) + len(found)
            rng = random.Random(f"{seed} {job.name} {number}")
            kind, phase = kinds[number % len(kinds)], rng.choice(possible)
            aim = draw_aim(rng, kind, phase, usual) if stop < MOST_STOPS else None
            begin = time.monotonic()
            ended = run(job, out, aim)
            finished = ended.code == 0
            if aim is not None:
                hit = ended.word.get("phase")
                trial = {
                    "kind": kind,
                    "aim": phase,
                    "phase": None if finished else hit,
                    "stopped": not finished,
                    "code": ended.code,
                    "seconds": round(time.monotonic() - begin, 2),
                    "said": ended.said.strip().splitlines()[-1:],
                }
                print(len(trials) + len(found), json.dumps(trial), flush=True)
                found.append(trial)
            if finished:
                break
            where = f"{job.name}, number {number}: {kind} in {ended.word}, code {ended.code}"
            assert aim is not None, f"{where}: it does not finish: {ended.said}"
            assert kind == "memory" or ended.code == CODES.get(kind, 75), f"{where}: {ended.said}"
            assert kind == "memory" or "Traceback" not in ended.said, f"{where}: {ended.said}"
            before = job.check(out, before)
            if ended.word.get("phase") in job.ending:
                possible = ["start", *job.ending]
        actual = job.outcome(out)
        assert actual == expected, f"{place}: {differences(expected, actual)}"
        hidden = {path.name for path in place.rglob(".*")} - {".lock", ".owner"}
        if kind == "read-only":  # and it finished: the file system became so when all was written
            hidden -= {f".{out.name}.lock"}
        assert not hidden, f"{place}: left behind: {hidden}"
        shutil.rmtree(place)
        trials += found
        write_json(kept, trials)
    return {
        "words": [word.replace(f"{work}/", "") for word in job.words],
        "undisturbed": usual,
        "processes": len(trials),
        "stops": [
            {name: trial[name] for name in ("kind", "phase")}
            for trial in trials
            if trial["stopped"]
        ],
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two plain values differ."""
    if type(a) is type(b) is dict:
        keys = sorted(a.keys() | b.keys())
        return [x for k in keys for x in differences(a.get(k), b.get(k), f"{where}.{k}")]
    return [] if a == b else [f"{where}: {str(a)[:100]} and {str(b)[:100]}"]


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def timeless(value: Any) -> Any:
    """A plain value without times and what depends on them."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if key not in TIMES}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def of_training(out: Path) -> Any:
    """Weights, results and metrics of a finished run."""
    folder = RunFolder(out)
    lines = folder.metrics.read_text().splitlines()
    return {
        "weights": hashes(folder.model) | hashes(folder.averaged),
        "result": timeless(json.loads(folder.result.read_text())),
        "metrics": [timeless(json.loads(line)) for line in lines],
    }


def check_training(out: Path, before: set[int] | None) -> set[int]:
    """Every checkpoint that can be seen is whole, and one is there if one was before."""
    folder = RunFolder(out)
    for step in folder.checkpoint_steps():
        verify_checkpoint(folder.checkpoint(step))
    steps = set(folder.checkpoint_steps())
    assert not before or max(steps, default=0) >= max(before), (before, steps)
    return steps


def whole_or_absent(out: Path, _: Any) -> None:
    """By the name of the output is nothing, or all of it, as it appears at once."""
    usual = out.parents[1] / "undisturbed" / "run"
    assert not out.exists() or hashes(out) == hashes(usual), sorted(out.iterdir())


def of_study(out: Path) -> Any:
    """What a study found, and its table."""
    folder = out / "mine-tiny"
    content = timeless(json.loads((folder / "study.json").read_text()))
    for variant in content["variants"]:
        for seed in variant["seeds"]:
            del seed["run"]  # its path
    return content | {"table": (folder / "table.md").read_text()}


def jobs(work: Path) -> dict[str, Job]:
    """The commands, on a text and a model made here."""
    text, store, model = work / "text.txt", work / "store", work / "model"
    rng = random.Random(0)
    words = ["the", "of", "and", "to", "in", "is", "was", "he", "for", "it", "with", "as", "his"]
    lines = (" ".join(rng.choices(words, k=9)) for _ in range(4000))
    work.mkdir(parents=True, exist_ok=True)
    text.write_text("".join(f"{line}.\n" for line in lines))
    tiny = {
        "model.hidden_size": 32,
        "model.num_hidden_layers": 2,
        "model.state_size": 32,
        "model.head_dim": 8,
        "model.dropout": 0.1,
        "data.sequence_length": 32,
        "schedule.warmup_steps": 2,
        "run.global_batch": 4,
        "run.precision": "fp32",
        "run.evaluate_tokens": 2000,
        "run.log_every": 1,
        "run.sample_tokens": 0,
    }
    settings = [f"--{key}={value}" for key, value in tiny.items()]
    averaged = ["--run.keep_best=5", "--run.average_best=5", "--run.steps=30"]
    often = ["--run.evaluate_every=5", "--run.checkpoint_every=3"]
    train = ["train", "pha-tiny.text", "--data", str(store), "--out", "{out}", *settings]
    of_train = {
        "pha.train.trainer:Trainer.train": "steps",
        "pha.train.trainer:Trainer._checkpoint": "checkpoint",
        "pha.train.trainer:Trainer._evaluate": "evaluation",
        "pha.train.run:finish": "finishing",
        "pha.train.finish:average_models": "averaging",
    }
    study = work / "mine.yaml"
    study.write_text(
        "{title: Mine, question: Why, variants: {a: {model: pha}, b: {model: attention-only}}, "
        "plots: []}"
    )
    of_study_words = ["study", str(study), "--seeds", "1", "--data", str(store), "--out", "{out}"]
    preparation = "pha.data.preparation:"
    found = [
        Job(
            "train",
            [*train, *averaged, *often],
            of_train,
            of_training,
            check_training,
            ("averaging", "finishing"),
        ),
        Job(
            "prepare",
            ["prepare", str(text), "--tokenizer", "bpe:270", "--out", "{out}"],
            {
                preparation + "load_tokenizer": "tokenizer",
                preparation + "_encode": "encoding",
                preparation + "atomic_folder": "folder",
                preparation + "write_json": "record",
            },
            hashes,
            whole_or_absent,
        ),
        # Its training processes are started anew and hold the pipe that `run` reads to its end: one
        # that went on would be waited for.
        Job(
            "study",
            [*of_study_words, *settings, "--run.steps=30", *often],
            {
                "pha.studies.study:run_jobs": "training",
                "pha.studies.study:make_outcome": "summary",
                "pha.studies.study:Files.write": "files",
            },
            of_study,
        ),
        Job(
            "export",
            ["export", str(model), "{out}", "--force"],
            {
                "pha.sharing.export:load_model": "loading",
                "pha.sharing.export:_write": "writing",
            },
            hashes,
            whole_or_absent,
        ),
    ]
    plain = Job("plain", [], {}, hashes)
    if not store.is_dir():
        prepare = ["prepare", str(text), "--tokenizer", "bytes", "--out", "{out}"]
        ended = run(dataclasses.replace(plain, words=prepare), store)
        assert ended.code == 0, ended.said
    if not model.is_dir():
        once = [*train, "--run.steps=2"]
        ended = run(dataclasses.replace(plain, words=once), model)
        assert ended.code == 0, ended.said
    return {job.name: job for job in found}


def count(stops: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many stops of each kind hit each phase."""
    counts = {kind: Counter(s["phase"] for s in stops if s["kind"] == kind) for kind in KINDS}
    return {kind: dict(counter) for kind, counter in counts.items()}


def table(counts: dict[str, dict[str, int]]) -> str:
    """The same as text."""
    phases = list(dict.fromkeys(phase for counter in counts.values() for phase in counter))
    rows = counts | {"all": {p: sum(c.get(p, 0) for c in counts.values()) for p in phases}}
    lines = [f"{'':12}" + "".join(f"{phase:>12}" for phase in (*phases, "all"))]
    for kind, counter in rows.items():
        numbers = [counter.get(phase, 0) for phase in phases]
        lines.append(f"{kind:12}" + "".join(f"{n:12}" for n in (*numbers, sum(numbers))))
    return "\n".join(lines)


def run_all() -> None:
    """Read the options, stop each command that often, and write kills.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--moments", type=int, default=100, help="for train (100)")
    parser.add_argument("--others", type=int, default=25, help="for each other command (25)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default="train,prepare,study,export")
    parser.add_argument("--work", type=Path, required=True, help="folder for what is made")
    parser.add_argument("--out", type=Path, help="folder for kills.json")
    options = parser.parse_args()
    # What the verbs import, so that the processes need not.
    for verb in ("train", "prepare", "study", "export"):
        find_verb(verb)
    for module in ("train.run", "report.tables", "sharing", "data.preparation", "studies.study"):
        importlib.import_module(f"pha.{module}")
    known = jobs(options.work.resolve())
    content: dict[str, Any] = {"kind": "kills", "protocol": __doc__, "seed": options.seed}
    content["commands"] = {}
    for name in options.commands.split(","):
        moments = options.moments if name == "train" else options.others
        found = torture(
            known[name], options.work.resolve(), moments, options.seed, options.kinds.split(",")
        )
        found["stops"] = count(found["stops"])
        content["commands"][name] = found
        print(f"{name}\n{table(found['stops'])}")
    content["provenance"] = provenance(torch.device("cpu"), "fp32")
    if options.out is not None:
        write_json(options.out / "kills.json", content)


if __name__ == "__main__":
    run_all()
