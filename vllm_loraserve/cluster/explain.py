"""Why an adapter is where it is: the numbers behind a placement, in sentences (`vllm-loraserve explain
ADAPTER`)."""

from __future__ import annotations

from vllm_loraserve.cluster.placement import (
    Placement,
    PlacementError,
    PlacementInput,
    server_loads,
)


def explain(inp: PlacementInput, placement: Placement, adapter: str, policy: str = "") -> list[str]:
    """Lines that explain the place of `adapter` in `placement`; PlacementError when nobody knows it."""
    spec = next((a for a in inp.adapters if a.name == adapter), None)
    if spec is None:
        raise PlacementError(f"explain: no adapter {adapter!r}; list them with `vllm-loraserve status`")
    demand = inp.demand.get(adapter, 0.0)
    weight = inp.weight(spec)
    total = sum(inp.weight(a) for a in inp.adapters)
    fair = total / sum(s.speed for s in inp.servers)
    heavier = sum(inp.weight(a) > weight for a in inp.adapters)
    lines = [
        f"{adapter}: rank {spec.rank}, {spec.rank_rows} rank rows, {spec.bytes / 2**20:.1f} MiB a copy"
        + (f"; placed by {policy}" if policy else ""),
        f"demand {demand:.1f} tokens/s, operating point {inp.op.at(spec.rank):.0f} tokens/s at rank {spec.rank}"
        + ("" if inp.op.measured else " (a modelled default, not measured: run `vllm-loraserve profile`)"),
        f"asks for {weight:.3f} of a server ({weight / total:.1%} of all demand, number {heavier + 1} of "
        f"{len(inp.adapters)}); a fair share is {fair:.3f}",
    ]
    if adapter in placement.unplaced:
        return [*lines, f"not placed: {placement.unplaced[adapter]}"]
    loads = server_loads(inp, placement)
    held = placement.by_server()
    for s, phi in sorted(placement.phi.get(adapter, {}).items(), key=lambda kv: -kv[1]):
        lines.append(
            f"{s}: {phi:.1%} of the requests; the server's predicted load is {loads.get(s, 0.0):.2f} of its operating "
            f"point with {len(held.get(s, []))} adapters"
        )
    if len(placement.phi.get(adapter, {})) > 1:
        lines.append(
            "more than one server because it is hot"
            if weight > 0.4 * fair
            else "more than one server because one alone had no room for all of its share"
        )
    standby = placement.standby.get(adapter, ())
    lines += [f"{s}: a warm standby copy, for bursts and failures" for s in standby]
    before = inp.previous.holders(adapter) if inp.previous is not None else []
    if before and set(before) != set(placement.holders(adapter)):
        lines.append(f"before it was on {', '.join(before)}")
    elif before:
        lines.append("unchanged since the last placement")
    return lines
