"""Addresses: brace lists of shards, and hf://."""

import pytest

from nrat_scale.core.errors import UserError
from nrat_scale.remote.address import HubAddress, expand, is_remote, parse_hub


@pytest.mark.parametrize(
    ("where", "folder", "names"),
    [
        ("/data/shards/", "/data/shards/", None),
        ("/data/shards/shard-00001.tar", "/data/shards", ["shard-00001.tar"]),
        ("shard-{00008..00010}.tar", ".", ["shard-00008.tar", "shard-00009.tar", "shard-00010.tar"]),
        ("/a.tar", "/", ["a.tar"]),
        ("https://host/data/", "https://host/data", None),
        ("s3://bucket/data/{a,b}.tar", "s3://bucket/data", ["a.tar", "b.tar"]),
        ("hf://datasets/user/repo@v1/x/shard-{0..1}.tar", "hf://datasets/user/repo@v1/x", ["shard-0.tar", "shard-1.tar"]),
    ],
)  # fmt: skip
def test_expand_splits_folder_and_names(where, folder, names):
    """A folder, one tar or a brace list, local and remote."""
    assert expand(where) == (folder, names)
    assert is_remote(where) == ("://" in where)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("https://host/shard-{00000..00001.tar", "cannot be expanded"),
        ("https://host/shard-{0..99999999}.tar", "more than 1000000 shards"),
    ],
)
def test_impossible_braces_are_refused(where, words):
    """Before any request, and without an endless list of names."""
    with pytest.raises(UserError, match=words):
        expand(where)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("hf://datasets/user/repo", HubAddress("user/repo", None, "")),
        ("hf://datasets/user/repo/", HubAddress("user/repo", None, "")),
        ("hf://datasets/user/repo/a/b.tar", HubAddress("user/repo", None, "a/b.tar")),
        ("hf://buckets/user/work/a/b.tar", HubAddress("user/work", None, "a/b.tar", "bucket")),
        ("hf://datasets/user/repo@v1", HubAddress("user/repo", "v1", "")),
        ("hf://datasets/user/repo@refs%2Fpr%2F1/a@b", HubAddress("user/repo", "refs/pr/1", "a@b")),
    ],
)
def test_hub_addresses(address, expected):
    """Repository, revision and path; a revision with a slash is percent-encoded."""
    assert parse_hub(address) == expected


@pytest.mark.parametrize(
    "address", ["hf://user/repo", "hf://datasets/repo", "hf://datasets/user/repo@", "https://host/a"]
)
def test_other_addresses_are_not_on_the_hub(address):
    """The message states the expected form."""
    with pytest.raises(UserError, match="expected hf://datasets/USER/REPO"):
        parse_hub(address)
