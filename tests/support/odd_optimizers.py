"""Optimizers that go wrong in the ways that some of Nevergrad's do, and in some more; imported, they are registered."""

import os
import random
import threading
import time
import warnings
from typing import Any

import numpy as np
from nevergrad.optimization.base import Optimizer, registry

LATE = 5  # proposals that go well


class Odd(Optimizer):
    def _internal_ask_candidate(self) -> Any:
        return self.parametrization.spawn_child(new_value=self.point())

    def point(self) -> Any:
        return self._rng.standard_normal(self.dimension)

    def _internal_tell_not_asked(self, candidate: Any, loss: float) -> None:
        self._internal_tell_candidate(candidate, loss)


@registry.register
class OddLate(Odd):
    def point(self) -> Any:
        if self.num_ask >= LATE:
            raise ValueError("singular matrix\nand more")
        return super().point()


@registry.register
class OddTold(Odd):
    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        if self.num_tell >= LATE:
            raise ZeroDivisionError


@registry.register
class OddHanging(Odd):
    def point(self) -> Any:
        if self.num_ask >= LATE:
            time.sleep(1000)
        return super().point()


@registry.register
class OddDying(Odd):
    def point(self) -> Any:
        if self.num_ask >= LATE:
            os.write(2, b"double free\n")
            os._exit(3)
        return super().point()


@registry.register
class OddNowhere(Odd):
    def point(self) -> Any:
        return np.full(self.dimension, np.nan if self.num_ask >= LATE else 0.0)


@registry.register
class OddForgetful(Odd):
    def point(self) -> Any:
        return np.random.default_rng().standard_normal(self.dimension)


@registry.register
class OddShared(Odd):
    def point(self) -> Any:
        return np.random.standard_normal(self.dimension) + random.random()


@registry.register
class OddLoud(Odd):
    """Prints, warns, and leaves a thread that no process ends with."""

    def point(self) -> Any:
        print("proposing" * 1000)
        for _ in range(100):
            warnings.warn("the budget is small\nand more", stacklevel=1)
        threading.Thread(target=time.sleep, args=(1000,)).start()
        return super().point()


@registry.register
class OddRepeating(Odd):
    def point(self) -> Any:
        return np.zeros(self.dimension)


@registry.register
class OddDeaf(Odd):
    """Cannot be told of what it did not propose."""

    def _internal_tell_not_asked(self, candidate: Any, loss: float) -> None:
        raise NotImplementedError("no such thing")


@registry.register
class OddSlow(Odd):
    def point(self) -> Any:
        time.sleep(0.2)
        return super().point()


@registry.register
class OddListening(Odd):
    """Proposes the last point that it was told of, and a tenth of its score beside it."""

    def _internal_tell_candidate(self, candidate: Any, loss: float) -> None:
        self.last = np.array(candidate.value) + loss / 10

    def point(self) -> Any:
        return getattr(self, "last", np.zeros(self.dimension))
