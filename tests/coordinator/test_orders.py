"""What instances are told to fetch ahead."""

from coordinator_bench import record

from vllm_loraserve.coordinator.messages import Capacity, PageGroup
from vllm_loraserve.coordinator.orders import fitting

QKV = PageGroup(modules=("q_proj", "k_proj", "v_proj"), row_bytes=2000)


def test_what_is_fetched_ahead_fits_the_host_tier_or_else_the_arena():
    records = [record(f"a{i}", rank=16) for i in range(10)]
    arena = Capacity(slots=8, rank_rows=64)
    assert len(list(fitting(records, arena))) == 4
    assert len(list(fitting(records, Capacity(slots=2, rank_rows=640)))) == 2
    host = Capacity(slots=1, rank_rows=64, host_adapters=7, host_bytes=10 * 16000)
    assert len(list(fitting(records, host))) == 7, "slots bound what runs together, not what is held"
    assert len(list(fitting(records, Capacity(slots=8, rank_rows=64, host_bytes=3 * 16000)))) == 3
    paged = Capacity(
        slots=8, rank_rows=640, host_bytes=3 * 16000, page_groups=(QKV, PageGroup(modules=("o",), row_bytes=9))
    )
    assert len(list(fitting(records, paged))) == 1, "pages: 16 rows of q, k and v, twice the checkpoint"
