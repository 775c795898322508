"""Processes that do not outlive the one that started them."""

import multiprocessing
import os
import threading


def die_with_parent() -> None:
    """End this process at once when the one that started it is gone, even if that was killed.

    Call it first thing in a process that `multiprocessing` started.
    """
    threading.Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
