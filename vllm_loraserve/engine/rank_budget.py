"""What LoRA may cost a step: rank rows of its adapters in the arena, and work for its tokens. Pure.

Room: the adapters of all running requests lie in the arena together, beside pinned ones, so a request of another
adapter is admitted only while slots and rank rows are left; pinned ones nobody uses give way where nothing else runs.
Work: what LoRA adds to a step is counted in base prompt tokens (RankCost); prefill of adapters, which can be cut finer,
is held to a share of the step's token budget as long as somebody else decodes. Decodes are never held back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vllm_loraserve.cluster.operating_points import OperatingPoints, load, shipped_defaults

MIN_CHUNK = 16
"""Tokens; the smallest prefill chunk that the work budget cuts, so that every prefill makes progress."""


@dataclass(frozen=True, slots=True)
class RankCost:
    """What one rank row of an adapter adds to a step, in the time of one prompt token of the base model: for every
    prompt token, for every generated token, and for being in the batch at all (its weights are read)."""

    prefill: float
    decode: float
    row: float = 0.0

    @classmethod
    def uniform(cls, cost: float) -> RankCost:
        """The same for every token, nothing for the row itself."""
        return cls(cost, cost)

    @classmethod
    def from_points(cls, points: OperatingPoints) -> RankCost:
        """From the fitted step cost of measured (or shipped) operating points; without one, from the points alone."""
        step = points.step_cost
        if step is None or step.prefill_token <= 0:
            return cls.uniform(cost_per_rank_from(points.points))
        unit = step.prefill_token
        return cls(
            *(max(each, 0.0) / unit for each in (step.prefill_token_rank, step.decode_token_rank, step.rank_row))
        )


def rank_cost(cost_per_rank: float | None, operating_points: str | None) -> RankCost:
    """`cost_per_rank` when it is given, else what the file of operating points says, else the shipped default.

    Raises OperatingPointsError or ValueError for a file that can't be used.
    """
    if cost_per_rank is not None:
        return RankCost.uniform(cost_per_rank)
    return RankCost.from_points(load(operating_points) if operating_points is not None else shipped_defaults())


def cost_per_rank_from(operating_points: Mapping[int, float]) -> float:
    """Work that one rank row adds to a token, in base tokens: least squares over operating points.

    `operating_points`: rank -> tokens/s that one instance carries with all traffic at that rank; a token's time is
    taken as a + b * rank, and b / a is returned. Raises ValueError with fewer than two ranks or a rate of 0.
    """
    if len(operating_points) < 2 or min(operating_points.values()) <= 0:
        raise ValueError(f"operating points need two ranks or more and positive tokens/s, got {dict(operating_points)}")
    ranks = list(operating_points)
    times = [1.0 / operating_points[rank] for rank in ranks]
    mean_rank, mean_time = sum(ranks) / len(ranks), sum(times) / len(times)
    variance = sum((rank - mean_rank) ** 2 for rank in ranks)
    covariance = sum((rank - mean_rank) * (time - mean_time) for rank, time in zip(ranks, times, strict=True))
    slope = max(covariance / variance, 0.0)
    base = mean_time - slope * mean_rank
    # A steep line may leave nothing for the base: then the smallest rank's time stands for it.
    return slope / (base if base > 0 else min(times))


@dataclass(slots=True)
class ArenaRoom:
    """Slots and rank rows, and which adapters of running requests take them. `rank_rows` None: only slots count."""

    slots: int
    rank_rows: int | None = None
    page_rows: int = 1
    _rows: dict[int, int] = field(default_factory=dict)
    """Adapter -> rank rows it takes, for adapters in use."""
    _users: dict[int, int] = field(default_factory=dict)
    used_rows: int = 0
    _pinned: dict[int, int] = field(default_factory=dict)
    """Pinned adapter -> rank rows it takes, used or not."""

    def rows_of(self, lora_rank: int) -> int:
        """Rank rows that an adapter of this rank takes: whole pages."""
        return -(-lora_rank // self.page_rows) * self.page_rows

    @property
    def largest_rank(self) -> int | None:
        """Of an adapter that fits the empty arena; None: any."""
        return None if self.rank_rows is None else self.rank_rows // self.page_rows * self.page_rows

    def fits(self, adapter: int, lora_rank: int) -> bool:
        """Whether a request of this adapter may join the running ones."""
        if adapter in self._users:
            return True
        return self.lacking(adapter, lora_rank) == (0, 0)

    def lacking(self, adapter: int, lora_rank: int) -> tuple[int, int]:
        """(slots, rank rows) that have to come free before this adapter fits."""
        # With nobody running, waiting for a pinned adapter to go could last for ever: the worker lets it give way.
        idle = [rows for pinned, rows in self._pinned.items() if pinned not in self._users and pinned != adapter]
        slots, taken = (len(idle), sum(idle)) if self._users else (0, 0)
        rows = 0 if self.rank_rows is None else self.used_rows + taken + self.rows_of(lora_rank) - self.rank_rows
        return max(len(self._users) + slots + 1 - self.slots, 0), max(rows, 0)

    def take(self, adapter: int, lora_rank: int) -> None:
        """One more running request of this adapter."""
        if adapter in self._users:
            self._users[adapter] += 1
            return
        self._users[adapter] = 1
        self._rows[adapter] = self.rows_of(lora_rank)
        self.used_rows += self._rows[adapter]

    def release(self, adapter: int) -> None:
        """One running request of this adapter less."""
        self._users[adapter] -= 1
        if not self._users[adapter]:
            del self._users[adapter]
            self.used_rows -= self._rows.pop(adapter)

    def assign(self, users: Mapping[int, tuple[int, int]], pinned: Mapping[int, int] | None = None) -> None:
        """What runs now: adapter -> (running requests, rank), and what is pinned: adapter -> rank."""
        self._pinned = {adapter: self.rows_of(rank) for adapter, rank in pinned.items()} if pinned else {}
        self._users = {adapter: count for adapter, (count, _) in users.items()}
        self._rows = {adapter: self.rows_of(rank) for adapter, (_, rank) in users.items()}
        self.used_rows = sum(self._rows.values())

    @property
    def users(self) -> Mapping[int, int]:
        """Adapter -> running requests."""
        return self._users

    def to_drain(self, adapter: int, lora_rank: int) -> set[int]:
        """The adapters whose running requests should end without successors, to make room for this one: those with
        the fewest running requests for the rank rows they give back; pinned ones, which give none back, last."""
        slots, rows = self.lacking(adapter, lora_rank)
        drain: set[int] = set()
        order = sorted(
            self._users,
            key=lambda user: (user in self._pinned, self._users[user] / max(self._rows[user], 1), user),
        )
        for user in order:
            if slots <= 0 and rows <= 0:
                break
            drain.add(user)
            if user not in self._pinned:
                slots, rows = slots - 1, rows - self._rows[user]
        return drain


@dataclass(slots=True)
class WorkBudget:
    """LoRA work of one step, in base prompt tokens."""

    cost: RankCost
    share: float | None
    left: float = 0.0
    spent: float = 0.0
    bounded: bool = False
    granted: bool = False
    """A prefill of an adapter runs in this step."""

    def begin(self, step_tokens: int, decode_rank_rows: int, rows: int, others_decode: bool) -> None:
        """A step of `step_tokens` starts; `decode_rank_rows`: sum of the ranks of requests that decode one token;
        `rows`: rank rows of the adapters that run."""
        self.spent = self.cost.decode * decode_rank_rows + self.cost.row * rows
        self.bounded = self.share is not None and others_decode and self.cost.prefill > 0
        self.left = (self.share or 0.0) * step_tokens - self.spent
        self.granted = False

    def allow(self, tokens: int, lora_rank: int) -> int:
        """How many of `tokens` prefill tokens of this rank may run in this step: all, fewer, or 0; not yet spent.

        The first prefill of a step always gets MIN_CHUNK, so that decodes alone can't hold prefill up for ever.
        """
        if not self.bounded or not lora_rank:
            return tokens
        most = int(self.left / (self.cost.prefill * lora_rank))
        if most >= tokens:
            return tokens
        if most >= MIN_CHUNK:
            return most
        return 0 if self.granted else min(tokens, MIN_CHUNK)

    def spend(self, tokens: int, lora_rank: int) -> None:
        """`tokens` prefill tokens of this rank were scheduled."""
        cost = self.cost.prefill * lora_rank * tokens
        self.left -= cost
        self.spent += cost
        self.granted = True
