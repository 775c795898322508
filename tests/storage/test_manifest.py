"""Manifests are whole or absent, and say who wrote them."""

import errno
import hashlib

import pytest

from vpmoe.errors import DataError
from vpmoe.storage import atomic
from vpmoe.storage.manifest import file_sha256, provenance, read_manifest, write_manifest


def test_what_is_written_is_read(tmp_path):
    manifest = {"b": [1, 2.5, None], "a": {"ü": "<|end|>"}}
    write_manifest(tmp_path / "manifest.json", manifest)
    assert read_manifest(tmp_path / "manifest.json") == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_broken_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(tmp_path / "manifest.json")


def test_a_missing_manifest_means_unfinished(tmp_path):
    with pytest.raises(DataError, match="unfinished"):
        read_manifest(tmp_path / "manifest.json")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    write_manifest(path, {"old": 1})

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(DataError, match="no space left"):
        write_manifest(path, {"new": 1})
    assert read_manifest(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_sha256_and_provenance(tmp_path):
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
    assert set(provenance()) == {"vpmoe_version", "git_sha"}
    with pytest.raises(DataError, match="cannot read"):
        file_sha256(tmp_path / "y")
