"""Answers about placement: a dry run of a policy (`plan`), and why an adapter is where it is (`explain`)."""

from __future__ import annotations

import math
import time

from vllm_loraserve.cluster.placement import (
    Placement,
    PlacementError,
    PlacementInput,
    make_policy,
)
from vllm_loraserve.cluster.predict import Prediction, predict
from vllm_loraserve.cluster.stability import interference_loads
from vllm_loraserve.coordinator.control import Controller
from vllm_loraserve.coordinator.membership import Refused
from vllm_loraserve.coordinator.messages import Explanation, Forecast, Plan, PlannedMove


def plan(controller: Controller, policy_name: str, now: float) -> Plan:
    """What `policy_name` (empty: the policy in force) would change; changes nothing. Raises Refused `invalid`."""
    loop = controller.loop
    inp = controller.placement_input(now)
    try:
        policy = make_policy(policy_name) if policy_name else loop.policy
        inp.validate()
        proposal = loop.propose(inp, policy)
    except PlacementError as error:
        raise Refused("invalid", f"{str(error)[:1].upper()}{str(error)[1:]}.") from None
    now_predicted = _predict(controller, inp, loop.placement, policy.additive)
    then_predicted = _predict(controller, inp, proposal.placement, policy.additive)
    return Plan(
        policy=policy.name,
        adopt=proposal.adopt and bool(proposal.moves),
        why=proposal.why,
        moves=tuple(
            PlannedMove(adapter=m.adapter, instance=m.instance, action=m.action, bytes=m.bytes) for m in proposal.moves
        ),
        bytes=sum(m.bytes for m in proposal.moves),
        now=_forecasts(now_predicted, loop.placement),
        then=_forecasts(then_predicted, proposal.placement),
        p95_now_s=_finite(now_predicted.p95_ttft_s),
        p95_then_s=_finite(then_predicted.p95_ttft_s),
        measured=loop.op.measured,
        demand=loop.history.last_backtest.explain(),
    )


def _predict(controller: Controller, inp: PlacementInput, placement: Placement, additive: bool) -> Prediction:
    """Queueing estimate by the policy's measure of load, with the size of requests as observed where there are any."""
    demand = controller.members.demand()
    requests = sum(d.requests_per_s for name, d in demand.items() if name)
    tokens = sum(d.tokens_per_s for name, d in demand.items() if name)
    if requests <= 0.0:
        return predict(inp, placement, additive=additive)
    # Reports do not tell prompt from output; the default's proportion is taken.
    size = tokens / requests
    return predict(inp, placement, additive=additive, prompt_tokens=0.8 * size, output_tokens=0.2 * size)


def _finite(seconds: float) -> float:
    return -1.0 if math.isinf(seconds) else seconds


def _forecasts(predicted: Prediction, placement: Placement) -> tuple[Forecast, ...]:
    held = placement.by_server()
    return tuple(
        Forecast(instance=name, load=load, adapters=len(held.get(name, ())))
        for name, load in sorted(predicted.loads.items())
    )


def explain(controller: Controller, name: str, now: float) -> Explanation:
    """Why the adapter `name` is where it is, in sentences. Raises Refused `not_found`."""
    record = controller.registry.get(name)
    if record is None:
        raise Refused(
            "not_found", f"There is no adapter '{name[:200]}'; `vllm-loraserve status` shows those there are."
        )
    loop = controller.loop
    inp = controller.placement_input(now)
    op = loop.op.at(record.rank)
    expected = inp.demand.get(name, 0.0)
    source = "measured" if loop.op.measured else "shipped defaults, not measured"
    taken = next((a.bytes for a in inp.adapters if a.name == name), record.size_bytes)
    lines = [
        f"'{name}' has rank {record.rank}, {record.size_bytes} bytes ({taken} in an instance's memory), "
        f"sha256 {record.sha256[:12]}, from '{record.source}'; it is {record.state}.",
        f"Expected demand: {expected:.1f} tokens/s ({loop.history.last_backtest.explain()}).",
        f"One instance sustains {op:.0f} tokens/s at that rank ({source}), so it asks for {expected / op:.1%}.",
    ]
    if record.state == "draining":
        lines.append("It is being removed: it gets no new requests.")
        return Explanation(lines=tuple(lines))
    if record.state == "failed":
        lines.append(f"It can't be served: {record.reason}")
        return Explanation(lines=tuple(lines))
    routes = loop.placement.phi.get(name, {})
    load = interference_loads(inp, loop.placement, loop.policy.additive)
    if name in loop.placement.unplaced:
        lines.append(f"It has no place: it {loop.placement.unplaced[name]}.")
    for instance, phi in sorted(routes.items()):
        lines.append(f"Placed on '{instance}' for {phi:.0%} of its requests; load there {load.get(instance, 0.0):.2f}.")
    lines += [f"Kept warm on '{instance}'." for instance in loop.placement.standby.get(name, ())]
    for member in controller.members.all():
        copy = member.resident.get(name)
        if copy is not None:
            stale = "" if copy.sha256 == record.sha256 else ", other content, to be released"
            lines.append(f"Resident on '{member.name}' ({copy.tier}{stale}).")
        elif member.name in routes:
            lines.append(_why_not_resident(controller, member.name, name, now))
    rate = controller.members.demand().get(name)
    if rate is not None:
        lines.append(
            f"Now: {rate.tokens_per_s:.1f} tokens/s, {rate.requests_per_s:.2f} requests/s, {rate.running} running."
        )
    if loop.decisions:
        at, text = loop.decisions[-1]
        lines.append(f"Last placement decision, {time.time() - at:.0f} s ago, policy {loop.policy.name}: {text}.")
    else:
        lines.append(f"Policy {loop.policy.name} has changed nothing since the coordinator started.")
    return Explanation(lines=tuple(lines))


def _why_not_resident(controller: Controller, instance: str, name: str, now: float) -> str:
    since = controller.commands.waiting_since(instance, name, "prefetch")
    failure = controller.commands.failure(instance, name)
    if since is not None:
        return f"'{instance}' is fetching it since {now - since:.1f} s."
    if failure is not None and now < failure.retry_at:
        return f"'{instance}' could not load it ({failure.error}); it is asked again in {failure.retry_at - now:.0f} s."
    return f"'{instance}' loads it with its next request: not everything placed there fits its memory together."
