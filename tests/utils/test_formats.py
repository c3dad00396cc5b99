from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from pha.utils.errors import PHAError
from pha.utils.files import cache_folder, user_path, write_json, write_text
from pha.utils.formats import decode, parse_json, read_file, read_json, read_yaml, to_json
from pha.utils.records import record_from

SCORES = {"a": math.nan, "b": [math.inf, (-math.inf, 1.5)], "c": 10**30}


def test_text_is_utf8_without_its_mark() -> None:
    assert decode(b"\xef\xbb\xbfa\r\n\xef\xbb\xbf", "it") == "a\r\n\ufeff"
    for encoding in ("utf-16", "utf-16-le", "utf-32", "latin-1"):
        with pytest.raises(PHAError, match=r"it .*convert it to UTF-8"):
            decode("caf\u00e9 and more".encode(encoding), "it")


def test_json_has_no_number_that_is_none_and_can_always_be_encoded() -> None:
    assert json.loads(to_json(SCORES), parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, [None, 1.5]],
        "c": 10**30,
    }
    name = os.fsdecode(b"caf\xe9") + "\u2028 \x85 \u4e2d"
    for ascii_only in (False, True):
        line = to_json({name: name}, ascii_only=ascii_only)
        assert len(line.encode().decode().splitlines()) == 1
        assert line.isascii() == ascii_only
        assert json.loads(line) == {name: name}


def test_files_keep_names_in_any_encoding(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / name, {"name": name})
    assert read_json(tmp_path / name) == {"name": name}
    write_text(tmp_path / "page", name)
    assert read_file(tmp_path / "page") == "caf\\udce9"


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1, "a": 2}', "[" * 100_000, "1" * 5000, '{"a": 1} x', "\ufeff\ufeff1"]
)
def test_what_is_not_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse_json(text)
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(PHAError, match=r"x\.json cannot be read as JSON"):
        read_json(tmp_path / "x.json")


def test_null_stands_for_a_number_that_is_none() -> None:
    from pha.results import Scores

    names = ("loss", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
    content = dict.fromkeys(names, None) | {"split": "test", "accuracy": math.inf}
    found = record_from(Scores, content, "result.json")
    assert math.isnan(found.loss)
    assert found.accuracy == math.inf  # of a file of before
    with pytest.raises(PHAError, match=r"result\.json: loss"):
        record_from(Scores, content | {"loss": 10**400}, "result.json")


BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(30)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n + 1}: &a{n + 1} {{<<: [{', '.join([f'*a{n}'] * 9)}]}}\n" for n in range(30)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "stand for too much"),
        (MERGES, "stand for too much"),
        ("a: &a [*a]", "stand for too much"),
        ("a: 1\nb: 2\na: 3", "names 'a' twice"),
        ("[" * 3000, "is not YAML"),
        ("a: 2001-99-99", "is not YAML"),
        ("a: !!int x", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("a: \x07", "is not YAML"),
        ("1: 2", "does not hold a mapping"),
        ("- a", "does not hold a mapping"),
        ("0", "does not hold a mapping"),
        ("#" * (2 << 20), "more than 1 MB"),
    ],
    ids=range(13),
)
def test_what_is_not_yaml(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PHAError, match=reason) as error:
        read_yaml(path)
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 500


def test_yaml_has_anchors_marks_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("\ufeffa: &a {x: 1}\nb: {<<: *a, y: 2}\n", encoding="utf-8")
    assert read_yaml(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}
    path.write_text("# nothing\n")
    assert read_yaml(path) == {}


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("no home")

    for name in ("PHA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(PHAError, match="PHA_CACHE"):
        cache_folder()
    assert user_path("~no-such-user/x") == Path("~no-such-user/x")
