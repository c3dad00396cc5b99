"""A model behind OpenAI's interface: `pha serve`, and `transformers serve` of an export."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pha.data.tokenizer import load_tokenizer
from pha.sharing import export_model
from pha.utils.errors import PHAError
from pha.utils.modules import EXTRAS
from tests.modeling.common import scrambled, small_config

MISSING = [package for package in EXTRAS["serve"] if find_spec(package) is None]
needs_server = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
# transformers' command where `pha` is not.
ALONE = """
import sys
sys.modules["pha"] = None
from transformers.cli.transformers import app
app()
"""
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose tokenizer has a chat template."""
    folder = tmp_path_factory.mktemp("serving")
    scrambled(small_config(vocab_size=257)).save_pretrained(folder / "saved")
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "saved")
    return export_model(folder / "saved", folder / "shared").path


@contextmanager
def serving(words: list[str], log: Path) -> Iterator[str]:
    """Where the server that `words` start answers."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words, "--port", str(port)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=file,
            stderr=file,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                urlopen(f"http://localhost:{port}/health").close()
                break
            except URLError:
                time.sleep(0.5)
        yield f"http://localhost:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def ask(url: str, **body: Any) -> dict[str, Any]:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


def greedy(folder: Path, prompt: str, tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize("command", ["pha", "transformers"])
def test_a_client_gets_the_text_that_the_model_writes(
    command: str, folder: Path, tmp_path: Path
) -> None:
    import openai

    ours = ["-m", "pha", "serve", str(folder)]
    alone = ["-c", ALONE, "serve", str(folder), "--trust-remote-code", "--device", "cpu"]
    expected = greedy(folder, "To be", 8)
    with serving(ours if command == "pha" else alone, tmp_path / "log") as url:
        asked: dict[str, Any] = {"model": str(folder), "max_tokens": 8, "temperature": 0}
        client = openai.OpenAI(base_url=url, api_key="none")
        completion = client.completions.create(prompt="To be", **asked)
        assert completion.choices[0].text == expected
        assert completion.usage is not None
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 8)
        parts = client.completions.create(prompt="To be", stream=True, **asked)
        streamed = "".join(part.choices[0].text for part in parts)
        # The server keeps back bytes that are no character yet, those at the end too.
        assert streamed
        assert expected.startswith(streamed)
        said = [{"role": "user", "content": "To be"}]
        chat = ask(f"{url}/chat/completions", messages=said, **asked)
        assert chat["choices"][0]["message"]["content"] == expected
        options = ["max_new_tokens=8", "do_sample=False"]
        talk = ["-m", "transformers.cli.transformers", "chat", str(folder), url, *options]
        told = subprocess.run(
            [sys.executable, *talk],
            input="To be\nn\n!exit\n",  # no more of that answer, then the end
            capture_output=True,
            text=True,
        )
        assert "8 tokens in" in told.stdout, told.stdout + told.stderr
        with pytest.raises(HTTPError, match="400"):
            ask(f"{url}/completions", **(asked | {"model": "other"}), prompt="x")


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    from pha.sharing.serving import serve_model

    with pytest.raises(PHAError, match="does not exist"):
        serve_model(tmp_path / "none", "localhost", 0)
    (tmp_path / "a@b").mkdir()
    (tmp_path / "a@b" / "config.json").write_text("{}")
    with pytest.raises(PHAError, match="for a revision"):
        serve_model(tmp_path / "a@b", "localhost", 0)
