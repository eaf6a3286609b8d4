"""Damage to what swirl wrote is told; what others wrote is read as it is."""

import json
import random

import pytest

from swirl.storage.digest import (
    DigestError,
    check_digests,
    checkpoint_digest,
    digests_of,
    read_manifest,
    seal,
    unseal,
    write_manifest,
)

OBJECT = {"id": "a#0", "steps": [{"action": 'é "x" }'}], "n": 1.5}
LINE = json.dumps(OBJECT).encode() + b"\n"
PRETTY = json.dumps(OBJECT, indent=2).encode() + b"\n"


@pytest.mark.parametrize("text", [LINE, PRETTY, b"{}", b"{\n}", LINE.strip()])
def test_a_sealed_object_is_the_object_and_a_field(text):
    sealed = seal(text)
    assert json.loads(sealed) == {**json.loads(text), "swirl_digest": json.loads(sealed)["swirl_digest"]}
    assert json.loads(unseal(sealed)) == json.loads(text)
    assert sealed.endswith(b"\n") == text.endswith(b"\n") == unseal(sealed).endswith(b"\n")
    assert unseal(text) == text
    assert seal(unseal(sealed)) == sealed or text == PRETTY or text == b"{\n}"


@pytest.mark.parametrize("text", [LINE, PRETTY])
def test_no_flipped_bit_and_no_cut_changes_a_sealed_object_unseen(text):
    sealed = seal(text).strip()
    damaged = [
        sealed[:i] + bytes([sealed[i] ^ 1 << bit]) + sealed[i + 1 :] for i in range(len(sealed)) for bit in range(8)
    ]
    for each in damaged + [sealed[:i] for i in range(len(sealed))]:
        try:
            found = json.loads(unseal(each))
        except ValueError:  # DigestError among them
            continue
        assert found == OBJECT and len(each) == len(sealed), each


def test_a_field_of_others_that_looks_like_a_digest_is_read_as_it_is():
    for text in (
        b'{"id":"a","commit":"0123456789abcdef"}\n',
        b'{"commit": "0123456789abcdef"}',
        b'"0123456789abcdef"}',
    ):
        assert unseal(text) == text


def test_an_edited_object_is_told_how_to_mend():
    with pytest.raises(DigestError, match="does not match its digest: .* take 'swirl_digest' out"):
        unseal(seal(LINE).replace(b"a#0", b"a#1"))


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(0)
    for name, size in (("model.safetensors", 30_000), ("config.json", 300), ("tokenizer.json", 0), ("README.md", 20)):
        (tmp_path / name).write_bytes(rng.randbytes(size))
    write_manifest(tmp_path, digests_of(path for path in tmp_path.iterdir() if path.suffix != ".md"))
    return tmp_path


def test_files_are_held_to_the_manifest(folder):
    assert sorted(read_manifest(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    check_digests(folder)
    (folder / "README.md").write_text("a card, edited")
    check_digests(folder)
    (folder / "model.safetensors").unlink()
    check_digests(folder, ["config.json"])
    with pytest.raises(DigestError, match="model.safetensors is missing"):
        check_digests(folder)
    (folder / "digests.json").unlink()
    check_digests(folder)


def test_every_flip_in_a_folder_is_told(folder):
    rng = random.Random(1)
    before = checkpoint_digest(folder)
    for name in ("model.safetensors", "config.json", "digests.json"):
        path = folder / name
        whole = path.read_bytes()
        for _ in range(40):
            at, bit = rng.randrange(len(whole)), rng.randrange(8)
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
            if name == "digests.json":
                try:
                    known = read_manifest(folder)
                except DigestError:
                    continue
                path.write_bytes(whole)
                assert known == read_manifest(folder)  # the flip was in white space
            else:
                with pytest.raises(DigestError, match=name):
                    check_digests(folder)
                assert checkpoint_digest(folder) != before
        path.write_bytes(whole)
    assert checkpoint_digest(folder) == before
