"""What the quickstart corpus is made of."""

import sysconfig
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import data.corpus
from data.corpus import package_docstrings, standard_library


def test_standard_library_is_source_code() -> None:
    skipped: Counter[str] = Counter()
    documents = {d.key: d for d in islice(standard_library(skipped), 200)}
    assert list(documents) == sorted(documents, key=lambda key: f"{key}.py".split("/"))
    root = Path(sysconfig.get_path("stdlib"))
    assert documents["asyncio/queues"].text == (root / "asyncio/queues.py").read_text()
    assert documents["asyncio/queues"].title.endswith("asyncio/queues.py")
    for key in documents:
        assert "." not in key.rpartition("/")[2]
        assert not {"test", "encodings", "site-packages"} & set(key.split("/"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder with one documented package."""
    folder = tmp_path / "numpy"
    folder.mkdir()
    monkeypatch.setattr(data.corpus, "DOCUMENTED_PACKAGES", ("numpy",))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    return folder


def test_docstrings_under_their_names(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.corpus, "_MIN_CHARACTERS", 1)
    (package / "core.v2.py").write_text(
        '"""Module."""\n'
        "def f():\n    '''F is.'''\n    x = '\\d'\n"
        "def _private():\n    '''Hidden.'''\n"
        "class C:\n    '''C is.'''\n    def g(self):\n        '''G does.'''\n    def h(self): pass\n"
    )
    [document] = package_docstrings(Counter())
    assert document.key == "numpy/core-v2"
    assert document.text == "Module.\n\nf\n\nF is.\n\nC\n\nC is.\n\nC.g\n\nG does."


def test_what_is_left_out_is_counted(package: Path) -> None:
    long = '"""' + "word " * 50 + '"""\n'
    (package / "good.py").write_text(long)
    (package / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n" + long.encode())
    (package / "short.py").write_text('"""Short."""\n')
    (package / "huge.py").write_text('"""' + "word " * 50_000 + '"""\n')
    (package / "future.py").write_text("def f(:\n")
    for folder in ("_private", "tests"):
        (package / folder).mkdir()
        (package / folder / "a.py").write_text(long)
    skipped: Counter[str] = Counter()
    assert [d.key for d in package_docstrings(skipped)] == ["numpy/good"]
    assert skipped == {
        "not UTF-8": 1,
        "too short": 1,
        "too long": 1,
        "not this Python's syntax": 1,
    }
