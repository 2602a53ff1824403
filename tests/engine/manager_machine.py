"""Run as a program by test_lora_manager_vllm.py: a hypothesis state machine over a real worker's LoRA manager.

Adapters of random ranks and modules are added, evicted, replaced, pinned, unloaded and used in mixed batches, in any
order, in an arena that holds a few of them; every LoRA layer must compute what a dict of their weights says.
Arguments: a directory for the tiny model and the adapters, and the number of examples.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from safetensors.torch import save_file

HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 2, 1, 2
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // HEADS * KV_HEADS),
    "self_attn.v_proj": (HIDDEN, HIDDEN // HEADS * KV_HEADS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
PACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
SLOTS, CPU_LORAS, ARENA_ROWS, PAGE = 3, 5, 96, 8
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]
WORKER: Any = None
FOLDER: Path


def make_model(folder: Path) -> Path:
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "num_hidden_layers": LAYERS,
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
        "tie_word_embeddings": True,
    }
    (model / "config.json").write_text(json.dumps(config))
    return model


def start(folder: Path) -> Any:
    from vllm import LLM

    llm = LLM(
        str(make_model(folder)),
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=16 << 20,
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=CPU_LORAS,
        max_lora_rank=8,
        additional_config={
            "loraserve": {
                "arena_rank_rows": ARENA_ROWS,
                "page_rows": PAGE,
                "host_gib": 0.05,
                "page_cache_dir": str(folder / "cache"),
            }
        },
    )
    return llm, llm.collective_rpc(lambda worker: worker)[0]


def write_adapter(folder: Path, ranks: dict[str, int], seed: int) -> Weights:
    """A PEFT checkpoint; the dict holds what it must compute: A, and B times its scaling."""
    generator = torch.Generator().manual_seed(seed)
    files, weights = {}, {}
    top = max(ranks.values())
    for layer in range(LAYERS):
        for module, rank in ranks.items():
            n_in, n_out = SHAPES[module]
            a, b = torch.randn(rank, n_in, generator=generator), torch.randn(n_out, rank, generator=generator)
            name = f"model.layers.{layer}.{module}"
            files[f"base_model.model.{name}.lora_A.weight"] = a
            files[f"base_model.model.{name}.lora_B.weight"] = b
            weights[name] = (a, b * (12.0 / rank))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(files, folder / "adapter_model.safetensors")
    pattern = {module.rsplit(".", 1)[-1]: rank for module, rank in ranks.items()}
    config = {"peft_type": "LORA", "r": top, "lora_alpha": 12, "rank_pattern": pattern, "target_modules": list(pattern)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return weights


def pages(ranks: dict[str, int]) -> tuple[int, ...]:
    return tuple(-(-max(ranks.get(part, 0) for part in parts) // PAGE) for parts in PACKED.values())


RANKS = st.dictionaries(st.sampled_from(list(SHAPES)), st.sampled_from([1, 4, 8, 9, 24, 40, 64]), min_size=1)


class ManagerMachine(RuleBasedStateMachine):
    """The dict of weights is the truth; the engine must agree whatever happened before."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = WORKER.model_runner.lora_manager
        self.manager.remove_all_adapters()
        self.ranks: dict[int, dict[str, int]] = {}
        self.weights: dict[int, Weights] = {}
        self.pinned: set[int] = set()
        self.seed = 0

    def _request(self, lora_id: int, load_inplace: bool = False) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"a{lora_id}", lora_id, str(FOLDER / f"a{lora_id}"), load_inplace=load_inplace)

    def _add(self, request: Any) -> bool:
        """At once, as within a step; outside of one the engine would only start a load aside."""
        from vllm_loraserve.engine.lora_manager import LoRAServeWorkerManager

        return LoRAServeWorkerManager.add_adapter(self.manager, request)

    def _fits(self, lora_ids: set[int]) -> bool:
        """Whether these can be active together, with the pinned ones that have their place."""
        return self._fit_together(lora_ids | (self.pinned & set(self.manager._adapter_manager._active_adapters.cache)))

    def _fit_together(self, together: set[int]) -> bool:
        if len(together) > SLOTS:
            return False
        needed = [pages(self.ranks[lora_id]) for lora_id in together]
        return all(sum(column) <= ARENA_ROWS // PAGE for column in zip(*needed, strict=True))

    def _write(self, lora_id: int, ranks: dict[str, int]) -> None:
        self.seed += 1
        self.ranks[lora_id] = ranks
        self.weights[lora_id] = write_adapter(FOLDER / f"a{lora_id}", ranks, self.seed)

    @rule(lora_id=st.integers(1, 8), ranks=RANKS)
    def create(self, lora_id: int, ranks: dict[str, int]) -> None:
        if lora_id not in self.ranks:
            self._write(lora_id, ranks)

    @rule(lora_id=st.integers(1, 8), ranks=RANKS)
    def replace_in_place(self, lora_id: int, ranks: dict[str, int]) -> None:
        if lora_id not in self.ranks or lora_id in self.pinned:
            return
        self._write(lora_id, ranks)
        if self._fits({lora_id}):
            WORKER.model_runner.lora_manager._adapter_manager.in_use = frozenset()
            assert self._add(self._request(lora_id, load_inplace=True))
        else:
            self.manager.remove_adapter(lora_id)

    @rule(lora_id=st.integers(1, 8), ranks=RANKS)
    def replace_aside(self, lora_id: int, ranks: dict[str, int]) -> None:
        """A load in place on a side thread: whoever uses the adapter next gets the new content."""
        if lora_id in self.ranks and lora_id not in self.pinned:
            self._write(lora_id, ranks)
            self.manager.prepare(self._request(lora_id))

    @rule(lora_id=st.integers(1, 8))
    def unload(self, lora_id: int) -> None:
        self.manager.remove_adapter(lora_id)
        self.pinned.discard(lora_id)
        assert lora_id not in self.manager.list_adapters()

    @rule(lora_id=st.integers(1, 8))
    def prepare(self, lora_id: int) -> None:
        if lora_id in self.ranks:
            self.manager.prepare(self._request(lora_id))
            assert self.manager.is_prepared(lora_id)
            known = self.manager._adapter_manager.adapter
            assert all(kept in self.manager.host or known(kept) for kept in self.manager._prepared), "gone for good"

    @rule(lora_id=st.integers(1, 8))
    def stage(self, lora_id: int) -> None:
        """A load's thread stages what it has prepared, while the engine steps."""
        manager = self.manager._adapter_manager
        active = lora_id in manager._active_adapters.cache
        results: list[bool] = []
        thread = threading.Thread(target=lambda: results.append(self.manager.stage(lora_id)))
        thread.start()
        while thread.is_alive():
            manager.stage_waiting()
            thread.join(1e-3)
        if active or lora_id not in self.manager.host:
            assert results == [False]
        if results == [True]:
            assert lora_id in manager.residents.staged()

    @rule(lora_id=st.integers(1, 8), unpin=st.booleans())
    def pin(self, lora_id: int, unpin: bool) -> None:
        if unpin:
            self.manager.unpin_adapter(lora_id)
            self.pinned.discard(lora_id)
        elif lora_id in self.manager.list_adapters() and len(self.pinned) < 2 and self._fits({lora_id}):
            self.manager._adapter_manager.in_use = frozenset()
            self._add(self._request(lora_id))
            assert self.manager.pin_adapter(lora_id)
            self.pinned.add(lora_id)

    def _expected_reads(self, used: set[int]) -> list[int]:
        self.read: list[int] = []
        return sorted(lora_id for lora_id in used if not self.manager.is_prepared(lora_id))

    @contextmanager
    def _crowded(self, crowd: bool) -> Iterator[bool]:
        """While the block runs reads are noted in `read`, and (crowd) loads on other threads take all the room of the
        host tier that they can get at the moment when an adapter is about to be activated."""
        host, prepare, touch = self.manager.host, self.manager.prepare, self.manager.host.touch

        def noted(request: Any) -> Any:
            self.read.append(request.lora_int_id)
            self.read.sort()
            return prepare(request)

        def evicting(key: Any, amount: float = 1.0) -> None:
            touch(key, amount)
            with host.lock:
                for candidate in host._candidates("crowd") if crowd else ():
                    host._evict(candidate.key)

        self.manager.prepare, host.touch = noted, evicting
        try:
            yield crowd
        finally:
            del self.manager.prepare, host.touch

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """A batch of base and adapter tokens through every LoRA layer."""
        from vllm.lora.layers import LoRAMapping

        from vllm_loraserve.engine.arena_residents import ArenaFullError

        chosen = data.draw(
            st.lists(st.sampled_from([0, *sorted(self.ranks)]), min_size=1, max_size=4), label="adapters"
        )
        used = set(chosen) - {0}
        tokens = data.draw(st.lists(st.sampled_from(chosen), min_size=len(chosen), max_size=12), label="tokens")
        tokens += [lora_id for lora_id in chosen if lora_id not in tokens]
        # vLLM keeps the flag in the request of every step that follows.
        inplace = data.draw(st.booleans(), label="load_inplace")
        requests = [self._request(lora_id, load_inplace=inplace) for lora_id in used]
        reads = self._expected_reads(used)
        mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=True)
        beside_pinned = self._fits(used)
        kept = self.pinned & set(self.manager._adapter_manager._active_adapters.cache)
        if not self._fit_together(used):
            try:
                self.manager.set_active_adapters(requests, mapping)
            except (ArenaFullError, RuntimeError):
                return
            raise AssertionError("more than fits was accepted")
        with self._crowded(data.draw(st.booleans(), label="loads aside evict")) as crowd:
            self.manager.set_active_adapters(requests, mapping)
        assert crowd or self.read == reads, "only what is not in memory is read in a step"
        model_manager = self.manager._adapter_manager
        if beside_pinned:
            assert kept <= set(model_manager._active_adapters.cache), "a pinned one went without need"
        for name, layer in model_manager.paged_modules.items():
            prefix, runtime = name[: len("model.layers.0")], name[len("model.layers.0.") :]
            x = torch.randn(len(tokens), SHAPES[PACKED[runtime][0]][0])
            y = torch.randn(len(tokens), sum(layer.output_slices))
            want = y.double().clone()
            for row, lora_id in enumerate(tokens):
                start = 0
                for part in PACKED[runtime]:
                    n_out = SHAPES[part][1]
                    pair = self.weights.get(lora_id, {}).get(f"{prefix}.{part}") if lora_id else None
                    if pair is not None:
                        a, b = pair
                        want[row, start : start + n_out] += x[row].double() @ a.double().T @ b.double().T
                    start += n_out
            layer.punica_wrapper.add_lora_linear(
                y, x, layer.lora_a_stacked, layer.lora_b_stacked, 1.0, layer.output_slices
            )
            error = (y.double() - want).abs().max() / want.abs().max()
            assert error < 1e-5, (name, tokens, float(error))

    @rule(rank=st.sampled_from([1, 8]))
    def warm_up(self, rank: int) -> None:
        """vLLM's dummy adapters, as before a profile run; they go as they came."""
        if self.manager.list_adapters():
            return
        # As vLLM does it: the first one is made, the others are its clones.
        with self.manager.dummy_lora_cache():
            for lora_id in range(1, SLOTS + 1):
                self.manager.add_dummy_lora(self._request(100 + lora_id), rank)
                assert self.manager.is_prepared(100 + lora_id), "nothing is to be read"
        self.manager.set_active_adapters([self._request(100 + lora_id) for lora_id in range(1, SLOTS + 1)], None)
        self.manager._adapter_manager.check_integrity()
        self.manager.remove_all_adapters()
        self.pinned.clear()

    @invariant()
    def nothing_is_lost(self) -> None:
        manager = self.manager._adapter_manager
        manager.check_integrity()
        assert len(manager) <= CPU_LORAS
        assert self.pinned <= set(manager._registered_adapters.cache)
        assert manager._active_adapters.pinned_items == self.pinned & set(manager._active_adapters.cache)


def main() -> None:
    global WORKER, FOLDER
    FOLDER = Path(sys.argv[1])
    llm, WORKER = start(FOLDER)
    run_state_machine_as_test(
        ManagerMachine,
        settings=settings(
            max_examples=int(sys.argv[2]),
            stateful_step_count=40,
            deadline=None,
            database=None,
            derandomize=True,  # the same orders on every run
            suppress_health_check=list(HealthCheck),
        ),
    )
    del llm
    print("MACHINE PASSED")


if __name__ == "__main__":
    main()
