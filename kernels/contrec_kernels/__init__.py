"""Triton kernels of contrec-fast.

Depends on torch and triton only. Importing this package needs neither, so that a machine without
triton can ask :func:`available` and go on with plain PyTorch.
"""


def available() -> tuple[bool, str]:
    """Whether Triton kernels can be launched here.

    Returns (True, the driver's target, such as ``"cuda:90"``) or (False, the reason in one line).
    Asked anew at each call. The interpreter (``TRITON_INTERPRET=1``) does not count: it is for
    tests.
    """
    try:
        from triton.runtime import driver
    except ImportError as error:
        return False, " ".join(f"triton cannot be imported: {error}".split())
    try:
        target = driver.active.get_current_target()
    except Exception as error:  # a broken driver can raise anything, and is just as unusable
        return False, " ".join(f"triton has no active GPU driver: {error}".split())
    return True, f"{target.backend}:{target.arch}"
