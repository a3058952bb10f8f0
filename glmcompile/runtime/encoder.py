"""The vision encoder on a thread of its own, so that decoding goes on beside it; its cache."""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from glmcompile.contract import Contract
from glmcompile.runtime.feeds import vision_feeds
from glmcompile.runtime.image_processor import ProcessedImage


@dataclass(frozen=True)
class Encoded:
    """An image's features float32 [image tokens, hidden], or the error that came instead.

    seconds: in the encoder, patches included.
    """

    image: ProcessedImage
    seconds: float
    features: NDArray[np.float32] | None = None
    error: Exception | None = None


class ImageEncoder:
    """Encodes one image after the other, in the order the scheduler wants them.

    `want` and `take` are the stepping thread's; the encoding thread calls `on_done` when there is
    something to take.
    """

    def __init__(
        self,
        open_session: Callable[[], ort.InferenceSession],
        model: Contract,
        on_done: Callable[[], None],
    ) -> None:
        """open_session: called on the encoding thread, whose priority its pool's threads inherit.

        Raises what open_session raises.
        """
        self._model, self._on_done = model, on_done
        self._condition = threading.Condition()
        self._wanted: list[ProcessedImage] = []
        self._current: ProcessedImage | None = None
        self._done: list[Encoded] = []
        self._closed = False
        opened: list[ort.InferenceSession | Exception] = []
        ready = threading.Event()

        def run() -> None:
            _lower_priority()
            try:
                opened.append(open_session())
            except Exception as error:
                opened.append(error)
                return
            finally:
                ready.set()
            self._work(opened[0])

        self._thread = threading.Thread(target=run, name="glmcompile-encoder", daemon=True)
        self._thread.start()
        ready.wait()
        if isinstance(opened[0], Exception):
            raise opened[0]

    @property
    def is_working(self) -> bool:
        """Whether images are being encoded, and none is ready to be taken."""
        return bool(self._current or self._wanted) and not self._done

    def want(self, images: Iterable[ProcessedImage]) -> None:
        """Encode these, the first one first; of earlier wishes only a begun one is kept."""
        with self._condition:
            known = {done.image.digest for done in self._done}
            if self._current is not None:
                known.add(self._current.digest)
            self._wanted = []
            for image in images:
                if image.digest not in known:
                    known.add(image.digest)
                    self._wanted.append(image)
            self._condition.notify_all()

    def take(self) -> list[Encoded]:
        """What has been finished since the last call."""
        with self._condition:
            done, self._done = self._done, []
        return done

    def wait(self, timeout: float | None = None) -> None:
        """Sleep until something can be taken, nothing is wanted, or `timeout` seconds are over."""
        with self._condition:
            self._condition.wait_for(lambda: not self.is_working, timeout)

    def close(self) -> None:
        """Stop after the image in work; the session goes with the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def encode(self, session: Any, image: ProcessedImage) -> NDArray[np.float32]:
        """Image features float32 [image tokens, hidden].

        One image per call: the result then depends on nothing but the image.
        """
        (features,) = session.run(None, vision_feeds(self._model, image))
        return features

    def _work(self, session: Any) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._wanted or self._closed)
                if self._closed:
                    return
                image = self._current = self._wanted.pop(0)
            began = time.perf_counter()
            try:
                features = self.encode(session, image)
                done = Encoded(image, time.perf_counter() - began, features)
            except Exception as error:
                done = Encoded(image, time.perf_counter() - began, error=error)
            with self._condition:
                self._current = None
                self._done.append(done)
                self._condition.notify_all()
            self._on_done()


class EncoderCache:
    """Image features by image digest; the least recently used go when there are too many bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._features: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()

    def get(self, digest: bytes) -> NDArray[np.float32] | None:
        features = self._features.get(digest)
        if features is not None:
            self._features.move_to_end(digest)
        return features

    def put(self, digest: bytes, features: NDArray[np.float32]) -> None:
        if digest not in self._features:
            self._features[digest] = features
            self.num_bytes += features.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._features.popitem(last=False)
            self.num_bytes -= oldest.nbytes

    def clear(self) -> None:
        self._features.clear()
        self.num_bytes = 0


def _lower_priority() -> None:
    """Of the calling thread and of those it starts: they take the cores that nobody else wants.

    The decoder's threads wait for one another many times a step, and each time the encoder had a
    core they would wait for it, too. Linux alone has a policy for each thread, and one by which it
    gives way at once (SCHED_IDLE, sched(7)); with a nice value it keeps its time slice first.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(threading.get_native_id(), os.SCHED_IDLE, os.sched_param(0))
