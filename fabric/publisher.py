"""The publisher's face: an outbox, and what is known of those who read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from fabric.engine.guarding import publishing_line
from fabric.engine.loans import LoanBase
from fabric.engine.outbox import Outbox
from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import WaitTimeoutError, shortened

__all__ = ["Loan", "Publisher", "PublisherBase"]


class PublisherBase(Outbox):
    """One topic of a member: what both faces share."""

    def _readers(self) -> dict[tuple[str, int], int]:
        """The first offset that is not acknowledged, by owed subscription of other members: (name, number)."""
        out = self.engine.core.publishing.feeds.get(self.topic)
        if out is None:
            return {}
        return {reader: floor for reader, floor in list(out.readers.items()) if self._is_elsewhere(*reader)}

    def _confirmed(self) -> list[tuple[str, int]]:
        """Those that are told what they are owed, which with state they are once it is written down."""
        registrations = self.engine.core.publishing.registrations
        return [reader for reader in self._readers() if registrations.is_confirmed(*reader)]

    def _is_elsewhere(self, member: str, number: int) -> bool:
        """Ours are nobody's to wait for, nor those that nobody has open."""
        return member != self.engine.card.name and number >= 0

    @property
    def _has_arrived(self) -> bool:
        """Whether the core has all that was taken; before that it may not know the feed, and so not who reads it."""
        out = self.engine.core.publishing.feeds.get(self.topic)
        return self.has_left and out is not None and out.end >= self.next

    def handled_by(self, offset: int) -> dict[str, bool]:
        """Whether each owed subscriber of another member has handled the record at this offset."""
        done: dict[str, bool] = {}
        for (name, _), floor in self._readers().items():
            done[name] = done.get(name, True) and floor > offset
        return done

    def _awaiting_subscribers(self, n: int, timeout_s: float) -> Steps[None]:
        """The steps of `wait_for_subscribers`."""
        if not (yield Wait(lambda: len(self._confirmed()) >= n, timeout_s)):
            names = sorted(name for name, _ in self._confirmed())
            state = f"{len(names)} of {n}: {shortened(names)}"
            raise WaitTimeoutError(f"{self.topic} has not enough subscribers", waited_s=timeout_s, state=state)

    def _flushing(self, timeout_s: float) -> Steps[None]:
        """The steps of `flush`."""
        self.close_burst()
        end = self.next

        def is_over() -> bool:
            behind = any(floor < end for floor in self._readers().values())
            return self._has_arrived and not behind and not self.engine.core.publishing.owes_past(self.topic)

        if not (yield Wait(is_over, timeout_s)):
            behind = [f"{name} at {floor}" for (name, _), floor in self._readers().items() if floor < end]
            text = f"{self.topic} is not acknowledged to {end}"
            raise WaitTimeoutError(text, waited_s=timeout_s, state=shortened(behind))

    def __repr__(self) -> str:
        return f"Publisher({self.topic!r}, {self.policy.value}, next={self.next})"


class Loan(LoanBase):
    """Memory of a publisher for one block, on one thread; see `Publisher.loan`."""

    def __enter__(self) -> Any:  # noqa: ANN401 - an array or a tensor
        return self._begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            run_steps(self._giving(), self._outbox._until)
        else:
            self._cancel()


class Publisher(PublisherBase):
    """One topic of this member. Thread-safe."""

    def loan(
        self,
        shape: int | Sequence[int],
        dtype: Any,  # noqa: ANN401 - numpy's or torch's
        *,
        seed: int = 0,
        metadata: Mapping[str, object] | None = None,
    ) -> Loan:
        """Lend memory to be written in place: a tensor (torch dtype) or array (numpy dtype), published without a copy.

        `with publisher.loan((1024, 1024), torch.float32) as t:` gives `t` with unknown content, in shared memory where
        subscribers of this host read it; leaving the block numbers and publishes it, as `publish(t)` would have, and
        `loan.sequence` tells. An exception publishes nothing. Either way `t` is emptied: it has no elements any more.
        What is written to a tensor later goes nowhere, to an array it raises `ValueError`.

        What refers to `t` then, or to a part of it, could still write: a view, a second variable, an array over it,
        autograd. So the value is copied once and the copy published, counted as `loans_copied` and told at debug level;
        `t` keeps its memory, which nobody else will ever see. With `guard="sample"` that is a warning; with
        `guard="strict"` leaving raises `MutationError`, and nothing is taken. What writes to the address that
        `data_ptr()` gave is seen by the guard alone, see `Fabric.publisher`, and by whoever reads.

        Raises as `publish`, `UnsupportedValueError` for a dtype or shape that cannot travel, `PayloadTooLargeError`;
        `ClosedError` when it is entered twice, `WrongThreadError` when another thread leaves it.
        """
        return Loan(self, shape, dtype, seed, metadata, publishing_line())

    def wait_for_subscribers(self, n: int, *, timeout_s: float = 60.0) -> None:
        """Until `n` owed subscriptions of other members are registered: each receives the record published next.

        Raises `WaitTimeoutError`.
        """
        run_steps(self._awaiting_subscribers(n, timeout_s), self._until)

    def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published is acknowledged by the owed subscriptions of other members.

        Raises `WaitTimeoutError`.
        """
        run_steps(self._flushing(timeout_s), self._until)
