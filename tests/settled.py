"""Freeze everything imported so far: no garbage collection touches it, so forked processes keep sharing its
memory. The fork server imports this last."""

import gc

gc.collect()
gc.freeze()
