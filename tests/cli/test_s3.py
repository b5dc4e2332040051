"""The program with a store in S3, from a build to its garbage."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.server


@pytest.fixture
def bucket(s3_server, monkeypatch):
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return f"s3://{s3_server.bucket()}/images"


def test_a_store_in_s3(erofsgen, bucket, sample_tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    erofsgen.options[1] = bucket
    built = [
        erofsgen("build", "--json", f"tar:{tar}", "--tag", f"sample:{number}").json
        for number, tar in enumerate(sample_tars, 1)
    ]
    assert built[1]["deduplicated_bytes"] > 0
    assert [row["name"] for row in erofsgen("images", "--json").json] == ["sample:1", "sample:2"]
    assert erofsgen("inspect", "sample:1", "--json").json["digest"] == built[0]["digest"]
    erofsgen("check")
    assert erofsgen("diff", "sample:1", "sample:2").out
    again = erofsgen("build", "--json", f"tar:{sample_tars[0]}", "--tag", "sample:1").json
    assert (again["digest"], again["new_packs"]) == (built[0]["digest"], 0)
    erofsgen("rm", "sample:2")
    assert erofsgen("gc", "--json").json["blobs"] > 0
    assert erofsgen("gc", "--json").json["blobs"] == 0
    erofsgen("check")


def test_garbage_waits_for_builders(erofsgen, bucket, sample_tars):
    from erofsgen.store.open import open_store

    erofsgen.options[1] = bucket
    erofsgen("build", f"tar:{sample_tars[0]}", "--tag", "sample:1")
    store = open_store(bucket)
    with store.building():
        assert "a build is running" in erofsgen("gc", code=9).err
    erofsgen("gc")
    store.close()
