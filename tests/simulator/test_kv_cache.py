"""KV blocks of a simulated instance: growth, preemption, and nothing lost by either."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_loraserve.simulator.kv_cache import KVCache
from vllm_loraserve.simulator.request import Request

from .one_server import MACHINE, run


def request(prompt: int, output: int, index: int = 0) -> Request:
    return Request(index, 0.0, -1, 0, prompt, output)


def test_a_request_takes_a_block_when_its_context_outgrows_the_last() -> None:
    cache, r = KVCache(64, 16), request(20, 40)
    assert cache.fits(r)
    cache.enter(r)
    assert (cache.used, r.kv) == (32, 32)
    cache.decodes(r, steps=5)
    # The step that computes token 33 is the thirteenth after the prompt.
    assert cache.steps_left(5) == 12
    assert cache.grow(16)
    assert cache.used == 32
    assert cache.grow(17)
    assert cache.used == 48
    other = request(1, 1)
    cache.enter(other)
    assert not cache.fits(request(1, 1))
    assert not cache.grow(17 + 16), "all four blocks are taken"
    cache.leave(other)
    assert cache.grow(17 + 16)
    cache.leave(r)
    assert (cache.used, r.kv) == (0, 0)
    assert cache.steps_left(100) == float("inf")


def test_without_blocks_a_request_holds_all_that_it_will_need() -> None:
    cache, r = KVCache(64, 0), request(20, 40)
    cache.enter(r)
    assert cache.used == 60
    assert not cache.fits(request(1, 4))
    cache.decodes(r, steps=5)
    assert cache.grow(1000)


def test_the_last_one_admitted_gives_way_and_is_computed_again() -> None:
    """Four blocks of 16; both requests come to need four."""
    tight = msgspec.structs.replace(MACHINE, kv_tokens=64, kv_block=16)
    requests = [(0.0, 0, 16, 40), (0.0, 0, 16, 40)]
    both = run(requests, machine=tight)
    alone = run(requests[:1], machine=tight)
    roomy = run(requests, machine=msgspec.structs.replace(tight, kv_tokens=160))
    assert both.ttft == pytest.approx(roomy.ttft), "both begin"
    assert both.finish[0] < roomy.finish[0], "the first one has the server to itself after 32 tokens"
    assert both.finish[0] > alone.finish[0]
    assert both.finish[1] > both.finish[0] + 20 * 0.010, "the second waits for its end; 40 - 17 tokens are left"
    assert both.finished == 2
    assert both.tbt.shape == (2,)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12), st.sampled_from([8, 16]))
def test_with_memory_for_all_blocks_change_nothing_and_without_it_nobody_is_lost(
    sizes: list[tuple[int, int]], block: int
) -> None:
    requests = [(0.01 * i, i % 2, prompt, output) for i, (prompt, output) in enumerate(sizes)]
    blocks = msgspec.structs.replace(MACHINE, kv_block=block)
    whole, paged = run(requests), run(requests, machine=blocks)
    assert np.allclose(whole.finish, paged.finish)
    assert np.allclose(whole.ttft, paged.ttft)
    tight = run(requests, machine=msgspec.structs.replace(blocks, kv_tokens=128))
    assert tight.finished == len(requests)
    assert tight.tokens_per_s * tight.duration_s == pytest.approx(sum(map(sum, sizes)))
    assert len(tight.tbt) == sum(output > 1 for _, output in sizes)
