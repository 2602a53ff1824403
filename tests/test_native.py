"""Compiled libraries are found beside the package, in site-packages, or where a variable points."""

from __future__ import annotations

from pathlib import Path

from vllm_loraserve import native


def test_places_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "tree" / "vllm_loraserve" / "native.py"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    beside = tmp_path / "tree" / "vllm_loraserve" / "_lib" / "x.so"
    installed = tmp_path / "site" / "vllm_loraserve" / "_lib" / "x.so"
    assert native.library_path("x.so", "X_LIBRARY") == beside  # for the message that it is not there
    for path in (installed, beside):
        path.parent.mkdir(parents=True)
        path.touch()
        assert native.library_path("x.so", "X_LIBRARY") == path
    monkeypatch.setenv("X_LIBRARY", "/elsewhere/y.so")
    assert native.library_path("x.so", "X_LIBRARY") == Path("/elsewhere/y.so")
