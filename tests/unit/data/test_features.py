"""A teacher's rows on disk: what was written comes back, anything else is refused."""

import json
import pickle

import numpy as np
import pytest
import torch

from genrecal_ds.data import features
from genrecal_ds.data.features import (
    CachedView,
    Features,
    FeatureStore,
    FeatureWriter,
    kept_rows,
)
from genrecal_ds.errors import UserError

pytestmark = pytest.mark.unit

IDENTITY = {"weights": "w", "tokens": "t", "data": "d"}


def sample(number: int, *lengths: int, dtype=torch.bfloat16) -> Features:
    torch.manual_seed(number)
    count = sum(lengths) + len(lengths)
    tokens = torch.randint(1, 50, (count,))
    return Features(torch.randn(count, 6).to(dtype), tokens, lengths)


def write(folder, samples: dict[int, Features], rank: int = 0) -> FeatureWriter:
    writer = FeatureWriter(folder, IDENTITY, rank)
    for number, found in samples.items():
        writer.add(number, found)
    writer.flush()
    return writer


def equal(a: Features, b: Features) -> bool:
    return (
        torch.equal(a.rows_RH, b.rows_RH)
        and torch.equal(a.tokens_R, b.tokens_R)
        and a.turn_lengths == b.turn_lengths
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_two_ranks_wrote_is_read_in_any_order(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(features, "BLOCK_BYTES", 50)  # several blocks
    given = {n: sample(n, *range(1, 2 + n % 3), dtype=dtype) for n in (7, 0, 3, 12, 5, 9)}
    given[4] = Features(torch.empty(0, 6, dtype=dtype), torch.empty(0, dtype=torch.int64), ())
    numbers = list(given)
    write(tmp_path, {n: given[n] for n in numbers[::2]}, rank=0)
    write(tmp_path, {n: given[n] for n in numbers[1::2]}, rank=3)
    assert len(list(tmp_path.glob("rank*.safetensors"))) > 3
    store = pickle.loads(pickle.dumps(FeatureStore(tmp_path, IDENTITY)))
    assert sorted(store.samples) == sorted(given)
    assert store.find(1) is None and store.find(99) is None and store.find(12) is not None
    for number in reversed(numbers):
        found = store.read(number)
        assert (found is None) == (number == 4)
        assert found is None or equal(found, given[number])


@pytest.mark.parametrize("width", [128, 70])
def test_rows_in_8_bits(tmp_path, width):
    """Half a step of its own 64 numbers away at most; one large number costs the others nothing."""
    torch.manual_seed(0)
    rows = torch.randn(5, width)
    rows[:, 3] *= 1000
    identity = {**IDENTITY, "rows": "int8"}
    writer = FeatureWriter(tmp_path, identity, 0)
    writer.add(4, Features(rows, torch.arange(5), (4,)))
    writer.add(6, Features(rows[:0], torch.empty(0, dtype=torch.int64), ()))
    writer.flush()
    (block,) = tmp_path.glob("*.safetensors")
    assert block.stat().st_size < rows.nbytes / 3 + 1500  # 8.5 bits of 32, and a header
    store = FeatureStore(tmp_path, identity)
    found = store.read(4).rows_RH
    assert found.dtype == torch.float32 and store.read(6) is None
    error = (found - rows).abs()
    for group in range(0, width, 64):
        own = slice(group, group + 64)
        bound = rows[:, own].abs().amax(1, keepdim=True) / 254
        assert (error[:, own] <= bound * 1.001).all()
    assert error[:, 64:].max() < 0.02 and found[:, 3].allclose(rows[:, 3], rtol=1e-6)
    zeros = features.in_8_bits(torch.zeros(2, width))
    assert not features.widened(*zeros, torch.bfloat16).any()


def test_a_flipped_bit_of_a_scale_is_found(tmp_path):
    identity = {**IDENTITY, "rows": "int8"}
    writer = FeatureWriter(tmp_path, identity, 0)
    writer.add(1, sample(1, 2, dtype=torch.float32))
    writer.flush()
    (block,) = tmp_path.glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(block)
    tensors["scales"][1, 0] *= 2
    save_file(tensors, block, {"dtype": "float32"})
    with pytest.raises(UserError, match="sample 1 is damaged"):
        FeatureStore(tmp_path, identity).read(1)


def test_a_second_start_keeps_what_is_there(tmp_path):
    first = write(tmp_path, {1: sample(1, 2)})
    first.add(1, sample(8, 3))  # the same sample again, in whatever state
    first.flush()
    again = write(tmp_path, {1: sample(9, 4), 2: sample(2, 1)})
    assert again.missing(np.array([0, 1, 2, 9])).tolist() == [0, 9]
    store = FeatureStore(tmp_path, IDENTITY)
    assert equal(store.read(1), sample(1, 2)) and equal(store.read(2), sample(2, 1))
    assert len(list(tmp_path.glob("rank*.safetensors"))) == 2


def test_half_a_block_is_not_there(tmp_path):
    write(tmp_path, {1: sample(1, 2)})
    (tmp_path / "rank0000-000001.safetensors.tmp").write_bytes(b"half")
    assert FeatureStore(tmp_path, IDENTITY).samples.tolist() == [1]


def test_what_does_not_belong_is_refused(tmp_path):
    with pytest.raises(UserError, match="no identity.json; run the stage that writes it"):
        FeatureStore(tmp_path / "nothing", IDENTITY)
    write(tmp_path, {1: sample(1, 2)})
    with pytest.raises(UserError, match="belong to tokens 't', this run has 'other'"):
        FeatureWriter(tmp_path, {**IDENTITY, "tokens": "other"}, 0)
    path = tmp_path / "rank0000-000000.safetensors"
    (tmp_path / "rank0001-000000.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="sample 1 is in two blocks"):
        FeatureStore(tmp_path, IDENTITY)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        FeatureStore(tmp_path, IDENTITY)
    stated = json.loads((tmp_path / "identity.json").read_text())
    (tmp_path / "identity.json").write_text(json.dumps({**stated, "format": 0}))
    with pytest.raises(UserError, match="belong to format 0"):
        FeatureStore(tmp_path, IDENTITY)


@pytest.mark.parametrize("name", ["rows", "tokens"])
def test_any_flipped_bit_of_a_sample_is_found(tmp_path, name):
    from safetensors.torch import load_file, save_file

    write(tmp_path, {1: sample(1, 2, 3), 2: sample(2, 4)})
    path = tmp_path / "rank0000-000000.safetensors"
    tensors = load_file(path)
    tensors[name].view(torch.uint8).numpy().reshape(-1)[-1] ^= 1  # in sample 2
    save_file(tensors, path)
    store = FeatureStore(tmp_path, IDENTITY)
    assert equal(store.read(1), sample(1, 2, 3))
    with pytest.raises(UserError, match="sample 2 is damaged"):
        store.read(2)


def test_an_error_of_the_disk_waits_for_flush(tmp_path, monkeypatch):
    writer = FeatureWriter(tmp_path, IDENTITY, 0)
    monkeypatch.setattr(features, "BLOCK_BYTES", 1)

    def full(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(features, "_write_block", full)
    writer.add(1, sample(1, 2))
    writer.add(2, sample(2, 2))
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    assert writer.failed


def test_a_view_stands_each_turn_behind_one_token():
    found = sample(1, 2, 3)
    chat = CachedView(found).encode([], [])
    assert chat.answers == ((1, 3), (4, 7)) and chat.questions == ((0, 1), (3, 4))
    cut = kept_rows(chat.cut(1))
    assert len(cut.input_ids_T) == len(cut.vision["rows"]) == 3
    assert np.array_equal(cut.input_ids_T, found.tokens_R[:3])


def test_a_view_of_the_last_turn_alone_has_its_rows_alone():
    found = sample(1, 2, 3)
    turns = [{"role": role} for role in ("user", "assistant", "user", "assistant")]
    first, second = (CachedView(found).encode(turns[:n], [], last_turn=True) for n in (2, 4))
    assert first.answers == ((1, 3),) and second.answers == ((1, 4),)
    assert torch.equal(first.vision["rows"], found.rows_RH[:3])
    assert torch.equal(second.vision["rows"], found.rows_RH[3:])
    assert torch.equal(second.input_ids_T, found.tokens_R[3:])


def test_untaught_answers_have_no_rows() -> None:
    found = sample(1, 2, 3)
    turns = [{"role": role} for role in ("user", "assistant") * 3]
    turns[0:2] = [turns[0], {"role": "assistant", "taught": False}]
    second = CachedView(found).encode(turns, [], last_turn=True)
    assert second.answers == ((1, 4),) and second.vision["rows"].shape[0] == 4
    assert second.input_ids_T.tolist() == found.tokens_R[3:].tolist()
