"""Memory in large pages: pieces side by side, each at a multiple of 64, that keep what they are parts of."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from fused_resnet.machine import malloc
from fused_resnet.machine.malloc import LargePages


def test_pieces_lie_side_by_side_and_apart():
    pages = LargePages(2**20)
    values = [torch.randn(5, 7), torch.randn(3).bfloat16(), torch.arange(1000)]
    copies = [pages.copied(value) for value in values]
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(values, copies))
    assert all(copy.data_ptr() % 64 == 0 and copy.is_contiguous() for copy in copies)
    begins = [copy.data_ptr() - copies[0].data_ptr() for copy in copies]
    assert begins == [0, 192, 256]
    copies[0].fill_(0)
    assert all(torch.equal(*pair) for pair in zip(values[1:], copies[1:]))


def test_what_is_larger_than_a_chunk_has_one_of_its_own():
    pages = LargePages(2**20)
    small, large = pages.empty(1), pages.empty(2**20 + 1)
    assert large.numel() == 2**20 + 1 and small.untyped_storage()._cdata != large.untyped_storage()._cdata
    large[-1] = 7


def test_little_memory_takes_no_large_page():
    piece = LargePages(4096).empty(4096)
    assert piece.untyped_storage().nbytes() == 4096 and piece.data_ptr() % 64 == 0


def test_a_piece_outlives_its_allocator():
    pages = LargePages(0)
    piece = pages.copied(torch.arange(100_000))
    del pages
    gc.collect()
    assert torch.equal(piece, torch.arange(100_000))


def test_memory_of_a_piece_goes_with_it_though_others_stay():
    """One weight that several plans share must not keep all that lay beside it."""
    pages = LargePages(2**21)
    first, second = (pages.empty(2**20).fill_(7) for _ in range(2))
    chunk, begin = pages._chunk, pages._used - 2**21
    assert chunk[begin] == chunk[begin + 2**20 - 1] == 7
    del first
    gc.collect()
    assert not any(chunk[begin : begin + 2**20]) and second.eq(7).all()
    del pages, chunk
    gc.collect()
    assert second.eq(7).all()


@pytest.mark.skipif(not malloc._is_glibc(), reason="only glibc keeps what is freed")
def test_free_memory_is_given_back():
    """What lies below a piece that is in use, too."""
    pieces = [torch.empty(2**16, dtype=torch.uint8).fill_(1) for _ in range(512)]
    last = pieces.pop()
    del pieces
    before = resident_bytes()
    malloc.trim()
    assert resident_bytes() < before - 2**24 and last.numel()


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
