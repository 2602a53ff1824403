"""The kernels compile for sm_80, sm_90 and sm_100, in bf16 and fp16, within a register and shared-memory
budget."""

import dataclasses

import pytest

pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be compiled here")

from vllm_loraserve.kernels.aot import compile_expand, compile_shrink
from vllm_loraserve.kernels.tuning import DeviceShape, choose

SHARED_PER_SM = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS_PER_SM = 64 * 1024

REGIMES = {
    "decode": {"block_m": 16, "block_r": 16, "items": 4, "top_rank": 128},
    "decode-rank-16": {"block_m": 16, "block_r": 16, "items": 4, "top_rank": 16},
    "prefill": {"block_m": 64, "block_r": 64, "items": 400, "top_rank": 128},
    "prefill-rank-16": {"block_m": 64, "block_r": 16, "items": 400, "top_rank": 16},
    "prefill-4-splits": {"block_m": 64, "block_r": 64, "items": 11, "top_rank": 128},
    "prefill-8-splits": {"block_m": 64, "block_r": 64, "items": 5, "top_rank": 128},
}
CASES = [
    pytest.param(name, dtype, capability, id=f"{name}-{dtype}-sm{capability}")
    for name in REGIMES
    for dtype in ("bfloat16", "float16")
    for capability in (80, 90, 100)
    if dtype == "bfloat16" or not name.endswith(("rank-16", "splits"))
]


@pytest.fixture(autouse=True, scope="module")
def compiled_in_this_process(tmp_path_factory):
    """A cache of its own: the test must compile, not find what an earlier version left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def config_for(regime, **options):
    return choose(k=4096, n_slices=3, device=DeviceShape(), **REGIMES[regime], **options)


def test_the_regimes_split_as_they_say():
    assert [config_for(f"prefill-{splits}-splits").split_k for splits in (4, 8)] == [4, 8]


@pytest.mark.parametrize(("regime", "dtype", "capability"), CASES)
def test_shrink_pipelines_its_loads_and_does_not_spill(regime, dtype, capability):
    config = config_for(regime)
    built = compile_shrink(config, dtype=dtype, capability=capability)
    assert built.spill_instructions == 0
    assert built.matrix_instructions > 0
    assert built.async_copies > 0, "no software pipeline"
    assert built.async_copies_16_bytes == built.async_copies, "copies are not as wide as they can be"
    assert built.registers <= (64 if config.block_m == 16 else 128)
    resident = 8 if config.block_m == 16 else 3
    assert resident * built.shared_bytes <= SHARED_PER_SM[capability]
    assert resident * built.registers * 32 * config.shrink_warps <= REGISTERS_PER_SM


@pytest.mark.parametrize(("regime", "dtype", "capability"), CASES)
def test_expand_does_not_spill(regime, dtype, capability):
    config = config_for(regime)
    built = compile_expand(config, dtype=dtype, capability=capability)
    # For sm_100 ptxas parks one register (one store, one load) to fit 96: any more is a change for the worse.
    assert built.spill_instructions <= (2 if capability == 100 else 0)
    assert built.matrix_instructions > 0
    # Where K of tall tiles is split 8 ways there are too few of them for two on an SM.
    resident = 4 if config.block_m == 16 else 2 if config.split_k < 8 else 1
    assert resident * built.shared_bytes <= SHARED_PER_SM[capability]
    assert resident * built.registers * 32 * config.expand_warps <= REGISTERS_PER_SM


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_planes_loaded_together_wait_less_and_still_fit(capability):
    """Layers whose K is split most: 16 planes, 8 of them loaded at once."""
    config = choose(k=14336, n_slices=1, device=DeviceShape(), **REGIMES["decode"])
    assert (config.split_k, config.expand_planes) == (16, 8)
    single = dataclasses.replace(config, expand_planes=1)
    one, eight = (compile_expand(c, dtype="bfloat16", capability=capability) for c in (single, config))
    assert eight.spill_instructions <= 2
    resident = 3 if capability == 80 else 4
    assert resident * eight.registers * 32 * config.expand_warps <= REGISTERS_PER_SM
    assert resident * eight.shared_bytes <= SHARED_PER_SM[capability]
    assert 3 * eight.barriers <= one.barriers


@pytest.mark.parametrize("regime", ["decode", "prefill"])
def test_a_plane_is_read_by_loads_of_16_bytes(regime):
    config = dataclasses.replace(config_for(regime), expand_planes=1)
    few, more = (
        compile_expand(dataclasses.replace(config, split_k=splits), dtype="bfloat16", capability=90)
        for splits in (1, 4)
    )
    assert more.loads - few.loads == more.loads_16_bytes - few.loads_16_bytes > 0
    assert few.loads_16_bytes > 0


@pytest.mark.parametrize("capability", [90, 100])
def test_a_dependent_launch_waits_for_the_planes_alone(capability):
    """Of all that expand reads only the partial planes come after the wait: with one split a single load or two."""
    plain = dataclasses.replace(config_for("decode"), split_k=1, expand_planes=1, expand_early_y=True)
    config = dataclasses.replace(plain, dependent_launch=True)
    expand = compile_expand(config, dtype="bfloat16", capability=capability)
    assert 1 <= expand.loads - expand.loads_before_wait <= 2
    assert expand.spill_instructions == 0
    assert expand.registers <= 128
    assert compile_shrink(config, dtype="bfloat16", capability=capability).lets_next_launch_start
    assert compile_expand(plain, dtype="bfloat16", capability=capability).loads_before_wait == 0
    assert not compile_shrink(plain, dtype="bfloat16", capability=capability).lets_next_launch_start


@pytest.mark.parametrize("regime", ["decode", "prefill"])
def test_odd_layers_compile_without_spills(regime):
    """Widths that are no multiple of 16 bytes, and an expand that overwrites y."""
    config = config_for(regime, aligned=False)
    shrink = compile_shrink(config, dtype="bfloat16", capability=90, aligned=False, even_k=False)
    expand = compile_expand(config, dtype="bfloat16", capability=90, aligned=False, add_inputs=False)
    for built in (shrink, expand):
        assert built.spill_instructions == 0
        assert built.matrix_instructions > 0


@pytest.mark.parametrize("regime", ["decode", "prefill"])
def test_a_tail_of_k_keeps_the_pipeline(regime):
    """K that is no multiple of the block (576 inputs): masked, but still with wide asynchronous copies."""
    built = compile_shrink(config_for(regime), dtype="bfloat16", capability=90, even_k=False)
    assert built.async_copies_16_bytes == built.async_copies > 0
    assert built.spill_instructions == 0


def test_the_checks_can_fail():
    """A tile far too large must show as spills or as a register count above every bound used here."""
    config = dataclasses.replace(config_for("prefill"), block_m=128, block_n=256, block_rank=64, expand_warps=4)
    built = compile_expand(config, dtype="bfloat16", capability=80)
    assert built.spill_instructions > 0 or built.registers > 128
