"""Work of the host beside that of the device."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ahead(call: Callable, inputs: Iterable, most: int = 1) -> Iterator:
    """`map(call, inputs)`, with the calls in a thread beside the caller's own work.

    Inputs are taken, `most` of them ahead of the results, in the caller's thread. An exception of
    a call is raised where its result is taken. Then, and where the caller stops early, calls that
    were begun are waited for.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for value in inputs:
            waiting.append(thread.submit(call, value))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
