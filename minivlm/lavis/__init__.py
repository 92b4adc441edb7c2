"""LAVIS in an environment of its own: a process that runs its interpreter, and the pipe to it.

:mod:`~minivlm.lavis.server` is the script that runs there, :mod:`~minivlm.lavis.client` starts it and asks.
"""
