"""Formats last: a sample of each is read, goes on and gives its figures; a newer one is refused.

`scripts/make_sample.py` made them, each with the pha of its time.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from pha import results
from pha.data import TokenStore, store
from pha.evals.perplexity import evaluate
from pha.evals.protocols import Protocol
from pha.loading import load_model
from pha.report.collect import collect
from pha.runs import RunFolder
from pha.train import checkpoint
from pha.train.recipes import load_recipe
from pha.train.run import run_training
from pha.utils.errors import PHAError
from pha.utils.versions import check_format

SAMPLES = sorted((Path(__file__).parent / "samples").glob("v*"), key=lambda path: path.name)
# The key of its format, and the one that is written today.
FILES = {
    "store/store.json": ("format", store.FORMAT),
    "run/config.yaml": ("format", results.CONFIG_FORMAT),
    "run/metrics.jsonl": ("format", results.METRICS_FORMAT),
    "run/result.json": ("version", results.VERSION),
    "run/checkpoints/step-8/trainer.json": ("format", checkpoint.FORMAT),
}


@pytest.fixture(params=SAMPLES, ids=lambda path: path.name)
def sample(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(request.param, tmp_path / request.param.name))


def go_on(sample: Path) -> None:
    """Read the run of a sample; then train it, from its checkpoint to its end."""
    collect([sample / "run"])
    config = load_recipe(str(sample / "run" / "config.yaml"), {"data.store": str(sample / "store")})
    run_training(config, sample / "run", Console(file=io.StringIO()))


def test_there_are_samples_and_they_stay_small() -> None:
    assert len(SAMPLES) >= 2
    sizes = [file.stat().st_size for each in SAMPLES for file in each.rglob("*.*")]
    assert sum(sizes) < 100_000 * len(SAMPLES)


@pytest.mark.parametrize("name", FILES)
def test_the_last_sample_has_the_formats_of_today(name: str) -> None:
    text = (SAMPLES[-1] / name).read_text(encoding="utf-8")
    key, newest = FILES[name]
    assert yaml.safe_load(text.splitlines()[0] if name.endswith(".jsonl") else text)[key] == newest


def test_a_sample_is_read_and_evaluated_to_its_figures(sample: Path) -> None:
    [run] = collect([sample / "run"])
    assert run.result is not None
    assert run.result.steps == run.metrics.train[-1].step == 12
    recorded = run.result.evaluation("test")
    assert recorded is not None
    store = TokenStore.open(sample / "store")
    assert store.sha256 == run.result.data["sha256"]
    model = load_model(sample / "run").model
    found = evaluate(model, store, "test", Protocol(16, 16, False), precision="fp32")
    assert found.loss == pytest.approx(recorded.loss, rel=1e-6)
    assert found.tokens == recorded.tokens


def test_a_sample_goes_on_to_its_end(sample: Path) -> None:
    run = RunFolder(sample / "run")
    recorded, metrics = run.read_result(), run.read_metrics()
    run.result.unlink()
    shutil.rmtree(run.model)
    go_on(sample)
    again = run.read_result()
    assert run.checkpoint_steps() == [8, 12]
    old = sample.name in ("v1", "v2")  # whose dropout was drawn from other seeds
    loss = recorded.evaluations[0].loss
    assert again.evaluations[0].loss == pytest.approx(loss, rel=1e-3 if old else 1e-5)
    losses = [[record.loss for record in each.train] for each in (metrics, run.read_metrics())]
    kept = sum(record.step <= 8 for record in metrics.train) if old else None
    assert losses[1][:kept] == pytest.approx(losses[0][:kept], rel=1e-5)
    assert len(losses[1]) == len(losses[0])


def test_a_finished_sample_stays_as_it_is(sample: Path) -> None:
    before = (sample / "run" / "result.json").read_bytes()
    go_on(sample)
    assert (sample / "run" / "result.json").read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_a_newer_format_is_refused_by_name(name: str, tmp_path: Path) -> None:
    sample = Path(shutil.copytree(SAMPLES[-1], tmp_path / "sample"))
    file = sample / name
    text = file.read_text(encoding="utf-8")
    if name.endswith(".jsonl"):
        head, _, rest = text.partition("\n")
        changed = json.dumps(json.loads(head) | {"format": 99}) + "\n" + rest
    else:
        content = yaml.safe_load(text) if name.endswith(".yaml") else json.loads(text)
        key, _ = FILES[name]
        assert isinstance(content[key], int)
        content[key] = 99
        if content.pop("digest", None):
            content["digest"] = checkpoint.digest(content)
        changed = json.dumps(content)  # which is YAML as well
    file.write_text(changed, encoding="utf-8")
    if "checkpoints" in name:
        (sample / "run" / "result.json").unlink()
    with pytest.raises(PHAError, match="written by a newer pha, format 99; this one reads up to"):
        go_on(sample)


@pytest.mark.parametrize("found", [None, "1", True, 1.5, -1, 2])
def test_a_format_that_is_none_is_refused(found: object) -> None:
    with pytest.raises(PHAError, match="this pha reads 3 to 4"):
        check_format("file", found, 4, oldest=3)
    check_format("file", 3, 4, oldest=3)
