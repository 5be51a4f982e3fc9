"""The public face as a world hands it out: the same calls, and what went through them is noted in the history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fabric.client import Fabric, Publisher
from fabric.config import Policy, WhenFull
from fabric.engine.columns import Int64s
from fabric.engine.guarding import publishing_line
from fabric.engine.inbox import Inbox
from fabric.engine.steps import Steps
from fabric.message import Message, RedrivenFeed
from fabric.payloads import own
from fabric.publisher import Loan
from fabric.subscription import Subscription
from fabric.table import Table
from fabric.topics import check_seed

if TYPE_CHECKING:
    from fabric.engine.dispatch import Dispatcher
    from fabric.engine.loop import Engine
    from fabric.engine.process import Membership
    from fabric.testing.history import FeedBook, History, SubscriptionBook

__all__ = ["WatchedFabric", "WatchedPublisher", "WatchedSubscription"]

Function = TypeVar("Function", bound=Callable[..., Any])


class WatchedPublisher(Publisher):
    """A publisher whose records are noted as they are taken."""

    history: History
    book: FeedBook

    def publish(self, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None) -> int:
        """As `Publisher.publish`."""
        sequence = super().publish(value, seed=seed, metadata=metadata)
        self.history.published(self.book, self.next - 1, check_seed(seed), sequence, value)
        return sequence

    def publish_many(self, values: Any, *, seeds: Any) -> list[int] | Int64s:  # noqa: ANN401 - any sequences
        """As `Publisher.publish_many`."""
        sequences = super().publish_many(values, seeds=seeds)
        first = self.next - len(sequences)
        for index, (value, seed, sequence) in enumerate(zip(values, seeds, sequences, strict=True)):
            self.history.published(self.book, first + index, check_seed(seed), int(sequence), value)
        return sequences

    def loan(
        self,
        shape: int | Sequence[int],
        dtype: Any,  # noqa: ANN401 - numpy's or torch's
        *,
        seed: int = 0,
        metadata: Mapping[str, object] | None = None,
    ) -> Loan:
        """As `Publisher.loan`."""
        return WatchedLoan(self, shape, dtype, seed, metadata, publishing_line())


class WatchedLoan(Loan):
    """A loan of which the value is noted as it is taken."""

    def _giving(self) -> Steps[None]:
        value, outbox = own(self.value), self._outbox
        yield from super()._giving()
        assert isinstance(outbox, WatchedPublisher), "it lent this"
        assert self.sequence is not None, "it is published"
        outbox.history.published(outbox.book, outbox.next - 1, self._origin.seed, self.sequence, value)


class WatchedSubscription(Subscription):
    """A subscription whose messages are noted as they are taken."""

    history: History
    book: SubscriptionBook

    def drain(self) -> Iterator[Message]:
        """As `Subscription.drain`."""
        return map(self._note, super().drain())

    def __iter__(self) -> Iterator[Message]:
        return map(self._note, super().__iter__())

    def receive(self, *, timeout_s: float = 10.0, into: Any = None) -> Message:  # noqa: ANN401 - tensors
        """As `Subscription.receive`."""
        return self._note(super().receive(timeout_s=timeout_s, into=into))

    def receive_many(self, n: int, *, timeout_s: float = 10.0) -> Table:
        """As `Subscription.receive_many`."""
        table = super().receive_many(n, timeout_s=timeout_s)
        for message in table:
            self._note(message)
        return table

    def _note(self, message: Message) -> Message:
        if type(message._feed) is RedrivenFeed:
            return message  # the history has it as a letter
        self.history.received(self.book, message)
        return message


class WatchedFabric(Fabric):
    """A member of a world."""

    publisher_class = WatchedPublisher
    subscription_class = WatchedSubscription

    def __init__(self, engine: Engine, dispatcher: Dispatcher, membership: Membership, history: History) -> None:
        super().__init__(engine, dispatcher, membership)
        self.history = history

    def _make_publisher(self, topic: str, policy: Policy, when_full: WhenFull, sync: str = "") -> Publisher:
        publisher = super()._make_publisher(topic, policy, when_full, sync)
        assert isinstance(publisher, WatchedPublisher)
        publisher.history = self.history
        publisher.book = self.history.opened(self._engine, topic, policy.value, when_full.value)
        return publisher

    def _open(self, *arguments: Any) -> Inbox:  # noqa: ANN401 - handed through
        inbox = super()._open(*arguments)
        self.history.confirmed(self._book_of(inbox))
        return inbox

    def _book_of(self, inbox: Inbox) -> SubscriptionBook:
        card = self._engine.card
        return self.history.subscriptions[card.name, card.incarnation, inbox.number]

    def subscribe(self, pattern: str, **options: Any) -> Subscription:  # noqa: ANN401 - handed through
        """As `Fabric.subscribe`."""
        subscription = super().subscribe(pattern, **options)
        assert isinstance(subscription, WatchedSubscription)
        subscription.history, subscription.book = self.history, self._book_of(subscription._inbox)
        return subscription

    def on(self, pattern: str, **options: Any) -> Callable[[Function], Function]:  # noqa: ANN401 - handed through
        """As `Fabric.on`."""

        def decorate(function: Function) -> Function:
            def watched(message: Message) -> object:
                if type(message._feed) is RedrivenFeed:
                    return function(message)
                book = self.history.subscriptions[(*life.key, message._feed.subscription)]
                book.by_handler = True
                try:
                    result = function(message)
                except BaseException:
                    self.history.failed(book, message)
                    raise
                self.history.received(book, message)
                return result

            life = self.history.life_of(self._engine)
            enter(watched)
            return function

        enter = super().on(pattern, **options)
        return decorate

    def _bury(self, message: Message, reason: str, detail: str) -> None:
        super()._bury(message, reason, detail)
        self.history.buried(self._engine, message, reason)
