import pytest
import torch

from engine.model.tokens import Group, Layout, Packed, random_masking

MIXED = Layout((Group(2, 5), Group(3, 2)))


def test_layout_counts_and_hashes():
    assert (MIXED.tokens, MIXED.sequences, MIXED.max_seqlen) == (16, 5, 5)
    assert hash(MIXED) == hash(Layout((Group(2, 5), Group(3, 2))))
    assert Layout((Group(3, 2), Group(2, 5))) != MIXED


def test_cu_seqlens_are_int32_bounds_and_cached():
    cu_seqlens = MIXED.cu_seqlens("cpu")
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 5, 10, 12, 14, 16]
    assert Layout((Group(2, 5), Group(3, 2))).cu_seqlens(torch.device("cpu")) is cu_seqlens


def test_cu_seqlens_first_asked_for_in_inference_mode_serve_training():
    layout = Layout((Group(3, 7),))
    with torch.inference_mode():
        assert not layout.cu_seqlens("cpu").is_inference()


def test_pack_and_unpack_are_inverse_and_unpack_copies_nothing():
    groups = [torch.randn(2, 5, 4), torch.randn(3, 2, 4)]
    packed = Packed.pack(groups)
    assert packed.layout == MIXED
    assert packed.tokens_TC.shape == (16, 4)
    assert all(torch.equal(a, b) for a, b in zip(packed.unpack(), groups, strict=True))
    packed.unpack()[1][2, 1].fill_(7)
    assert (packed.tokens_TC[-1] == 7).all()
    assert Packed.pack(groups[:1]).tokens_TC.data_ptr() == groups[0].data_ptr()


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        Packed(torch.zeros(15, 4), MIXED)
    with pytest.raises(ValueError, match="at least one"):
        Group(0, 5)


def test_random_masking_splits_by_noise():
    noise = torch.tensor([[0.3, 0.1, 0.2, 0.9], [0.5, 0.5, 0.5, 0.0]])
    visible, masked = random_masking(noise, keep=2)
    assert visible.tolist() == [[1, 2], [3, 0]]
    assert masked.tolist() == [[0, 3], [1, 2]]
    assert visible.dtype == masked.dtype == torch.int64
    for keep in (0, 5):
        with pytest.raises(ValueError, match="cannot keep"):
            random_masking(noise, keep)
