"""The timing model: occupancy against NVIDIA's own examples, small cases by hand, and what can never be faster."""

import pytest

from fused_resnet.emulation.interface import Counts
from fused_resnet.emulation.timing_model import GPUS, LAUNCH_US, Shape, predict, resident_blocks, wgmma_bytes

A100, L40S, H200 = GPUS["a100"], GPUS["l40s"], GPUS["h200"]


@pytest.mark.parametrize(
    "gpu, threads, registers, shared_bytes, blocks",
    [
        # CUDA C++ best practices guide, "Calculating Occupancy", for the same limits as an A100's: 75 % with 12 blocks
        # of 128 threads, 63 % with 4 of 320
        (A100, 128, 37, 0, 12),
        (A100, 320, 37, 0, 4),
        (A100, 32, 16, 0, 32),  # blocks
        (L40S, 32, 16, 0, 24),
        (A100, 1024, 32, 0, 2),  # warps: 64
        (L40S, 1024, 32, 0, 1),  # warps: 48
        (H200, 256, 255, 0, 1),  # registers: 8 warps of 256 x 32
        (H200, 128, 168, 0, 3),  # 12 warps, three for each scheduler
        (H200, 128, 32, 113 * 1024, 2),  # shared memory: 2 x (113 + 1) KiB of 228
        (H200, 128, 32, 113 * 1024 + 1, 1),
        (A100, 128, 32, 163 * 1024, 1),
        (L40S, 128, 32, 49 * 1024, 2),
        (L40S, 128, 32, 100 * 1024, 0),
    ],
)
def test_occupancy(gpu, threads, registers, shared_bytes, blocks):
    assert resident_blocks(gpu, Shape(1, threads, registers, shared_bytes)) == blocks


# A matrix product's block on an A100, 16 x 256 x 2048 multiply-adds by 1024 a cycle: 8192 cycles
PRODUCT = Counts(warp_instructions=8000, mma=4096, tensor_multiply_adds=2**23, cp_async=1024, global_load_sectors=8192)
SHAPE = Shape(blocks=216, threads=128, registers=128, shared_bytes=48 * 1024)


def test_a_product_by_hand():
    """Two blocks a multiprocessor, together."""
    found = predict(A100, PRODUCT, 1, SHAPE, memory_bytes=0)
    assert (found.resident, found.waves, found.bound) == (3, 1, "tensor")
    assert found.parts["tensor"] == pytest.approx(2 * 8192 / 1410)
    assert found.parts["issue"] == pytest.approx(2 * 2000 / 1410)
    assert found.parts["L2"] == pytest.approx(216 * 8192 * 32 / 7.219e6)
    assert found.parts["latency"] == pytest.approx(470 * 6 / 1410)  # 256 KiB, 48 at a time, two blocks at once
    assert found.us == pytest.approx(LAUNCH_US + 470 / 1410 + 2 * 8192 / 1410)


def test_the_busiest_multiprocessor_decides():
    just, more = (predict(A100, PRODUCT, 1, SHAPE._replace(blocks=n), memory_bytes=0) for n in (216, 217))
    assert more.parts["tensor"] == pytest.approx(1.5 * just.parts["tensor"])
    one = predict(A100, PRODUCT, 1, SHAPE._replace(blocks=1), memory_bytes=0)
    assert one.parts["tensor"] == pytest.approx(just.parts["tensor"] / 2)
    assert one.parts["L2"] == pytest.approx(8192 * 32 / 64 / 1410)  # what one can take: 64 bytes a cycle


def test_a_lone_block_waits_for_memory_in_every_wave():
    shape = SHAPE._replace(blocks=3 * 108, shared_bytes=160 * 1024)
    found = predict(A100, PRODUCT, 1, shape, memory_bytes=0)
    assert (found.resident, found.waves) == (1, 3)
    assert found.us == pytest.approx(LAUNCH_US + 3 * 470 / 1410 + found.parts["tensor"])


def test_an_addition_is_bound_by_memory():
    """Three arrays of 48 MB through an H200's 4.8 TB/s: 30 us."""
    sectors = 48_000_000 // 32
    counts = Counts(
        warp_instructions=1000, global_load_sectors=2 * sectors, global_store_sectors=sectors,
        distinct_load_sectors=2 * sectors, distinct_store_sectors=sectors,
    )  # fmt: skip
    found = predict(H200, counts, 1320, Shape(1320, 256, 32, 0))
    assert found.bound == "memory"
    assert found.parts["memory"] == pytest.approx(30)
    assert found.parts["L2"] == pytest.approx(144e6 / 5.5e6)


def test_wgmma_has_a_rate_of_its_own_and_reads_shared_memory():
    """m64n64k16 by four warps: 65536 products in 32 cycles, and 4096 bytes, which take 32 cycles too."""
    counts = Counts(wgmma=4, tensor_multiply_adds=65536)
    assert wgmma_bytes(counts, 2) == 4096
    found = predict(H200, counts, 1, Shape(1, 128, 90, 0), memory_bytes=0)
    assert found.parts["tensor"] == found.parts["shared"] == pytest.approx(32 / 1830)
    by_mma = predict(H200, Counts(mma=32, tensor_multiply_adds=65536), 1, Shape(1, 128, 90, 0), memory_bytes=0)
    assert by_mma.parts["tensor"] == pytest.approx(65536 / 1288 / 1830)
    tf32 = Counts(wgmma=4, tensor_multiply_adds=32768)  # m64n64k8
    assert wgmma_bytes(tf32, 4) == 4096
    assert predict(H200, tf32, 1, Shape(1, 128, 90, 0), element_bytes=4, memory_bytes=0).parts["tensor"] == (
        pytest.approx(32 / 1830)
    )


def test_a_sample_stands_for_all():
    twice = Counts(*(2 * count for count in PRODUCT))
    assert predict(A100, twice, 2, SHAPE, memory_bytes=1e6) == predict(A100, PRODUCT, 1, SHAPE, memory_bytes=1e6)


# wgmma alone says which rate the products have
@pytest.mark.parametrize("field", [field for field in Counts._fields if field != "wgmma"])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_more_work_is_never_faster(gpu, field):
    busy = Counts(*(1000 for _ in Counts._fields))
    for base in (PRODUCT, busy):
        more = base._replace(**{field: 10 * getattr(base, field) + 10**7})
        assert predict(gpu, more, 1, SHAPE).us >= predict(gpu, base, 1, SHAPE).us


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_more_bytes_blocks_or_registers_are_never_faster(gpu):
    for counts in (PRODUCT, Counts(*(1000 for _ in Counts._fields))):
        times = [predict(gpu, counts, 1, SHAPE, memory_bytes=size).us for size in (0, 1e6, 1e8)]
        times += [predict(gpu, counts, 1, SHAPE._replace(blocks=n), memory_bytes=1e8).us for n in (10**5, 10**6)]
        assert times == sorted(times) and times[0] < times[-1]
        times = [predict(gpu, counts, 1, SHAPE._replace(registers=n), memory_bytes=0).us for n in (32, 128, 255)]
        assert times == sorted(times)


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit on an l40s's"):
        predict(L40S, PRODUCT, 1, SHAPE._replace(shared_bytes=2**17))


@pytest.mark.parametrize(
    "name, tflops", [("a100", 312), ("l40s", 362), ("rtx4090", 165.2), ("h100", 989), ("h200", 989)]
)
def test_rates_give_the_data_sheets_peaks(name, tflops):
    """For fp16 added up in fp32, without sparsity."""
    gpu = GPUS[name]
    assert 2e-6 * gpu.num_sms * gpu.clock_mhz * (gpu.wgmma or gpu.mma) == pytest.approx(tflops, rel=0.015)
