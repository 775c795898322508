"""How many requests a server gets at once: as many as make it faster, fewer when it says so."""

_GAIN = 1.05  # a larger limit stays when it brought this much more throughput
_WINDOWS_HELD = 16  # of answers at a settled limit, before a larger one is tried again
_WINDOWS_AFTER_OVERLOAD = 4


class Pace:
    """The number of requests in flight at one server, found by climbing.

    A window is as many answers as two full rounds. When its throughput beats the best one seen,
    the limit grows by half; when it does not, the limit goes back to where the best one was and
    rests. An overload halves it at once.

    Args:
        start: Requests in flight to begin with.
        ceiling: Never more than these.

    References:
        own; additive-increase schemes of congestion control grow on success too, but stop only on
        loss. Difference: growth stops when throughput does, since a server queues without loss.
    """

    def __init__(self, *, start: int, ceiling: int) -> None:
        self.limit = min(start, ceiling)
        self._ceiling = ceiling
        self._best_limit, self._best_rate = self.limit, 0.0
        self._hold = 0
        self._begin: float | None = None
        self._answers, self._tokens = 0, 0

    def begin(self, now: float) -> None:
        """A new batch of work starts; the pause before it counts for nothing."""
        self._begin, self._answers, self._tokens = now, 0, 0

    def answered(self, num_tokens: int, now: float) -> None:
        """An answer about `num_tokens` tokens came back at time `now`."""
        if self._begin is None:
            self._begin = now
        self._answers += 1
        self._tokens += num_tokens
        if self._answers < max(4, 2 * self.limit):
            return
        rate = self._tokens / max(now - self._begin, 1e-6)
        self.begin(now)
        if self._hold:
            self._hold -= 1
            if self._hold == 0:
                self._best_rate = rate  # the queue or the lengths may have changed since
                self._grow()
        elif rate > self._best_rate * _GAIN:
            self._best_limit, self._best_rate = self.limit, rate
            self._grow()
        else:
            self.limit, self._hold = self._best_limit, _WINDOWS_HELD

    def _grow(self) -> None:
        self._best_limit = self.limit
        self.limit = min(self._ceiling, self.limit + max(1, self.limit // 2))
        if self.limit == self._best_limit:
            self._hold = _WINDOWS_HELD

    def overloaded(self, now: float) -> None:
        """The server refused a request, or did not answer in time."""
        self.limit = self._best_limit = max(1, self.limit // 2)
        self._best_rate, self._hold = 0.0, _WINDOWS_AFTER_OVERLOAD
        self.begin(now)
