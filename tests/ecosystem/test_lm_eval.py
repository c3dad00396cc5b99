"""lm-evaluation-harness by its own command line, which knows nothing of us."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [{"text": "One two", "end": " three"}, {"text": "To be", "end": " or not"}]
TASK = {
    "task": "ends",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{end}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity"}],
}


def test_its_own_command_line(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "ends.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = TASK | {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    (tmp_path / "ends.yaml").write_text(yaml.safe_dump(task))
    options = {"--tasks": "ends", "--include_path": tmp_path, "--output_path": tmp_path / "out"}
    options |= {"--model": "hf", "--device": "cpu", "--batch_size": 2}
    options["--model_args"] = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    command = [sys.executable, "-m", "lm_eval", "run", *map(str, sum(options.items(), ()))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())["results"]["ends"]["perplexity,none"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    nats = []
    for row in ROWS:
        ids = tokenizer(row["text"] + row["end"], return_tensors="pt").input_ids
        with torch.no_grad():
            log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
        nats.append(-float(log_p[-len(row["end"]) :].sum()))
    assert found == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-3)
